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

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.system.cli import Parser, run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("report", __doc__)
    parser.add_argument(
        "--result_file", required=True, metavar="RECORD", help="the attack record: a folder name below --record_root"
    )
    parser.add_argument("--defense_name", default="fmp", metavar="NAME", help="the run's result folder (default fmp)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="other result folders beside it, for a table")
    parser.add_argument("--record_root", default="./record", metavar="FOLDER", help="attack records (default ./record)")
    parser.add_argument("--save_folder", metavar="FOLDER", help="where the run's results are, as given to fmp.py")
    parser.add_argument("--dataset_path", default="./data", metavar="FOLDER", help="datasets (default ./data)")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda:0 (default auto)")
    args = parser.parse_args(argv)
    return run_main("report", lambda: run(args))


def run(args: Namespace) -> None:
    from fmp_core.report.page import report_on  # imports torch, which takes seconds

    print(f"report written to {report_on(**vars(args))}")


if __name__ == "__main__":
    sys.exit(main())
