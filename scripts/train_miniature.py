"""Train the miniature from scratch: ``python scripts/train_miniature.py --seed 0 --out runs/miniature-0``.

``--measure FOLDER [--adapter A]`` prints what such a model, perhaps with a breaker, sees, knows and refuses.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mm_cb.miniature.making.make import UPBRINGINGS, make
from mm_cb.models import load_model


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--out", type=Path)
    chosen.add_argument("--measure", type=Path, metavar="FOLDER")
    parser.add_argument("--adapter", type=Path, help="of the model that is measured")
    parser.add_argument("--family", choices=sorted(UPBRINGINGS), default="llava_next", help="what is raised")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.measure is not None:
        report = UPBRINGINGS[options.family].measure(load_model(options.measure, adapter=options.adapter), 0)
    else:
        report = make(options.seed, options.out, architecture=options.family, threads=options.threads)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
