"""Train the miniature from scratch: ``python scripts/train_miniature.py --seed 0 --out runs/miniature-0``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mm_cb.miniature.making.make import ARCHITECTURES, make


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), default="llava_next", help="what is raised")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    report = make(options.seed, options.out, architecture=options.family, threads=options.threads)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
