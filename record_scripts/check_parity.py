#!/usr/bin/env python3
"""Check that FMP and your BackdoorBench agree on a record: the same figures, the same images, the same files.

    python defense/fmp.py --result_file badnet_cifar10                 # first: the check reads what FMP wrote
    python record_scripts/check_parity.py --backdoorbench ~/BackdoorBench --result_file badnet_cifar10

BackdoorBench's own code runs in a process of its own (its ``load_attack_result``, ``choose_index``, ``test_current_model``,
and one epoch of its ``ft.py``); no file of it and none of the record is changed. Exit code 0 if all agree, 1 if anything does
not, 2 if the check cannot be made.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.system.cli import Parser, run_main

ROOT = Path(__file__).absolute().parents[1]  # a BackdoorBench checkout, if install.py put this script there


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser("check_parity", __doc__)
    parser.add_argument("--backdoorbench", metavar="DIR", default=str(ROOT), help="a checkout (default: around this script)")
    parser.add_argument("--result_file", metavar="RECORD", required=True, help="the record: a folder below --record_root")
    parser.add_argument("--record_root", metavar="DIR", default="./record", help="default: ./record")
    parser.add_argument("--dataset_path", metavar="DIR", default="./data", help="default: ./data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 (default: auto)")
    parser.add_argument("--python", metavar="PROGRAM", default=sys.executable, help="runs BackdoorBench (default: this one)")
    return parser.parse_args(argv)


def run(args: Namespace) -> int:
    from fmp_core.backdoorbench.parity import check_parity
    from fmp_core.backdoorbench.process import in_own_process
    from fmp_core.backdoorbench.workspace import open_job

    place = args.backdoorbench, args.record_root, args.result_file, args.dataset_path, args.device
    checks = check_parity(in_own_process(open_job, *place), args.python)
    print("\n".join(map(str, checks)))
    failed = sum(check.passed is False for check in checks)
    skipped = sum(check.passed is None for check in checks)
    print(f"\n{len(checks) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_main("check_parity", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
