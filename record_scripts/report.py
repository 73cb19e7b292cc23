#!/usr/bin/env python3
"""Write report.html about a finished run, from the files it left.

    python record_scripts/report.py --result_file badnet_cifar10
    python record_scripts/report.py --result_file badnet_cifar10 --compare ft fp      # a table with other defenses

Reads record/<result_file>/ (the attack) and record/<result_file>/defense/<defense_name>/ (the run), and writes report.html
into the latter. Needs the clean data, too.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.fields import add_flags, parse_flags
from fmp_core.settings import Settings
from fmp_core.system.cli import Parser, run_main

FLAGS = ("result_file", "defense_name", "record_root", "save_folder", "dataset_path", "device")  # as fmp.py has them
HELP = {"save_folder": "the run's --save_folder, where its results lie in <record>/defense/ of it instead of in the record"}


def main(argv: list[str] | None = None) -> int:
    parser = Parser("report", __doc__)
    add_flags(parser, Settings, FLAGS, HELP)
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="other result folders beside it, for a table")
    args = parser.parse_args(argv)
    if args.result_file is None:
        parser.error("name the attack record: --result_file RECORD")
    return run_main("report", lambda: run(args))


def run(args: Namespace) -> None:
    from fmp_core.report.page import report_on  # imports torch, which takes seconds

    print(f"report written to {report_on(Settings(**parse_flags(Settings, vars(args))), args.compare)}")


if __name__ == "__main__":
    sys.exit(main())
