#!/usr/bin/env python3
"""Make a table or figure of the FMP paper: run what is missing, then print ours | published | difference.

    python record_scripts/paper_tables.py --table 5 --scale demo --device cpu          # minutes on two cores
    python record_scripts/paper_tables.py --table 1a --backdoorbench ~/BackdoorBench   # the paper's size, and its baselines
    python record_scripts/paper_tables.py --figure 4 --no_run                          # only from results that are there

Missing records are made by make_record.py, missing defenses run as a sweep; running it again goes on where it stopped.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.results.paper import FIGURES, SCALES, TABLES
from fmp_core.sweeps.paper import make
from fmp_core.system.cli import Parser, if_it_ends_early, run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("paper_tables", __doc__)
    parser.add_argument("--table", nargs="+", default=[], choices=TABLES, help="number in the paper")
    parser.add_argument("--figure", nargs="+", default=[], choices=FIGURES, help="number in the paper")
    parser.add_argument("--scale", choices=SCALES, default="full", help="; ".join(scale.says for scale in SCALES.values()))
    parser.add_argument("--record_root", metavar="FOLDER", default="./record", help="the folder of attack records")
    parser.add_argument("--dataset_path", metavar="FOLDER", default="./data", help="the folder of datasets")
    parser.add_argument("--backdoorbench", metavar="FOLDER", help="a checkout; without it only FMP and fine-tuning are run")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="as in a sweep file (default auto)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="jobs at a time on each GPU, or on the CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of every defense")
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local", help="where jobs run")
    parser.add_argument(
        "--slurm", type=Path, metavar="FILE", help="YAML with what slurm: may hold in a sweep file: partition, ..."
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands of what would run")
    parser.add_argument("--no_run", action="store_true", help="show the results that are there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="folder of the figures")
    args = parser.parse_args(argv)
    if not args.table and not args.figure:
        parser.error("name a --table or a --figure")
    return run_main("paper_tables", lambda: run(args))


def run(args: Namespace) -> int:
    with if_it_ends_early("results of jobs that have ended stay"):
        return make(args, lambda text: print(f"paper_tables: {text}", file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
