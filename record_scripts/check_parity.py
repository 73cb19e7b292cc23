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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.backdoorbench.workspace import add_job_flags, job_of
from fmp_core.system.cli import Parser, run_main

ROOT = Path(__file__).absolute().parents[1]  # a BackdoorBench checkout, if install.py put this script there


def run(args: Namespace) -> int:
    from fmp_core.backdoorbench.parity import check_parity  # imports pandas, which takes a second

    checks = check_parity(job_of(args), args.python)
    print("\n".join(map(str, checks)))
    results = [check.passed for check in checks]
    print(f"\n{results.count(True)} passed, {results.count(False)} failed, {results.count(None)} skipped")
    return int(False in results)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("check_parity", __doc__)
    add_job_flags(parser, ROOT)
    args = parser.parse_args(argv)
    return run_main("check_parity", lambda: run(args), effect="begin anew")


if __name__ == "__main__":
    sys.exit(main())
