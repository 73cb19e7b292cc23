#!/usr/bin/env python3
"""Gather the results of all defenses of all records into one table.

    python record_scripts/collect.py                                  # ./record, printed
    python record_scripts/collect.py record --csv results.csv --html results.html --latex results.tex
    python record_scripts/collect.py record --leaderboard backdoorbench_leaderboard.csv     # published rows beside ours

Reads ``record/**/defense/*``, ours and BackdoorBench's. The csv and parquet files hold fractions, the printed tables percent.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.system.cli import Parser, run_main

FILES = {
    "csv": "tidy table, fractions",
    "parquet": "the same as parquet (needs pyarrow)",
    "markdown": "tables, percent",
    "latex": "booktabs tables, percent",
    "html": "a page with sortable tables",
    "figure": "ASR against lost accuracy, a panel per attack (.svg, .pdf or .png)",
    "roc": "ROC curves of the verdict of --preset strong and of Neural Cleanse (.svg, .pdf or .png)",
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser("collect", __doc__)
    parser.add_argument("record_root", nargs="?", default="./record", help="the folder of attack records (default ./record)")
    for name, what in FILES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--leaderboard", type=Path, metavar="FILE", help="BackdoorBench's leaderboard csv; its rows are labelled published"
    )
    args = parser.parse_args(argv)
    return run_main("collect", lambda: run(args))


def run(args: Namespace) -> None:
    from fmp_core.results.export import export  # imports pandas, which takes a second

    def warn(text: str) -> None:
        print(f"collect: {text}", file=sys.stderr)

    files = {name: path for name in FILES if (path := getattr(args, name)) is not None}
    print(export(args.record_root, files, args.leaderboard, shutil.get_terminal_size((128, 40)).columns, warn))


if __name__ == "__main__":
    sys.exit(main())
