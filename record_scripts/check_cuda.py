#!/usr/bin/env python3
"""Check FMP on this machine's GPU: tests, the demo, the CPU's selection, speed. ``make test-cuda`` installs and runs this.

    python record_scripts/check_cuda.py
    python record_scripts/check_cuda.py --quick        # small model, few images: tries every command; its speeds mean nothing

It ends with one table, also in ``cuda_check/table.md``: device, driver, versions, what passed and failed, figures. It fits into
a bug report. Beside it lies what every command printed. Exit code 0 if all passed, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.system.cli import Parser, run_main


def run(args: argparse.Namespace) -> int:
    from fmp_core.cuda_check import check_cuda, require_gpu

    if args.probe:
        require_gpu()
        return 0
    return check_cuda(args.folder, args.quick)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("check_cuda", __doc__)
    parser.add_argument("--probe", action="store_true", help="only ask the driver for a GPU; needs no installed package")
    parser.add_argument("--quick", action="store_true", help="small model, few images")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=Path("cuda_check"), help="default: cuda_check")
    args = parser.parse_args(argv)
    return run_main("check_cuda", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
