#!/usr/bin/env python3
"""Run a matrix of records x defenses x settings x seeds.

    python record_scripts/sweep.py SWEEP.yaml                      # on this machine: `workers` at a time on each GPU, or CPU
    python record_scripts/sweep.py SWEEP.yaml --dry_run            # print the commands
    python record_scripts/sweep.py SWEEP.yaml --launcher slurm     # on a cluster

Running it again skips what is done. docs/sweeps.md describes the sweep file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.sweeps.plan import read_sweep
from fmp_core.sweeps.run import run_sweep
from fmp_core.system.cli import Parser, if_it_ends_early, run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("sweep", __doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--launcher", choices=["local", "slurm", "submitit-local"], default="local", help="default: local")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and what is done, run nothing")
    args = parser.parse_args(argv)

    def run() -> int:
        with if_it_ends_early("results of jobs that have ended stay"):
            return run_sweep(read_sweep(args.sweep), args.launcher, args.dry_run)

    return run_main("sweep", run)


if __name__ == "__main__":
    sys.exit(main())
