"""Put a demo's numbers, picture and breaker into results/: ``python scripts/publish_miniature.py RUN [--name NAME]``.

Nothing here measures. The breaker (seed 0) is kept because training it again on another machine gives another one, and
whoever doubts a number needs the one that it was measured on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mm_cb.report import picture

KEPT = ("adapter_model.safetensors", "adapter_config.json", "base.json", "README.md", "metrics.jsonl")
"""What an adapter is loaded from, its card and its losses."""


def main() -> None:
    """Copy from a finished run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--name", default="miniature", help="what the files are called")
    options = parser.parse_args()
    run = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    if run["command"] != "demo" or not run["ended"]:
        raise SystemExit(f"`{options.run}` must be a finished `mm-cb demo`; start the same command again to finish it.")
    options.out.mkdir(exist_ok=True)
    shutil.copyfile(options.run / "results.json", options.out / f"{options.name}.json")
    picture(options.run, options.out / f"{options.name}.png")
    keep_breaker(options.run / "adapters" / "rr", options.out / options.name / "rr")
    print(f"{options.out / options.name}: revision {run['git']}, {run['started'][:10]}; say so in results/README.md")


def keep_breaker(trained: Path, kept: Path) -> None:
    """Copy an adapter, in place of what was published before."""
    if not (trained / KEPT[0]).is_file():
        return
    shutil.rmtree(kept.parent, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in KEPT:
        shutil.copyfile(trained / name, kept / name)


if __name__ == "__main__":
    main()
