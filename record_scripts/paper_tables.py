#!/usr/bin/env python3
"""Make a table or figure of the FMP paper: run what is missing, then print ours | published | difference.

    python record_scripts/paper_tables.py --table 5 --scale demo --device cpu          # minutes on two cores
    python record_scripts/paper_tables.py --table 1a --backdoorbench ~/BackdoorBench   # the paper's size, and its baselines
    python record_scripts/paper_tables.py --figure 4 --no-run                          # only from results that are there

Missing records are made by make_record.py, missing defenses run as a sweep; running it again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import pandas as pd
from fmp_core.data.attack_record import find_records
from fmp_core.errors import UserError
from fmp_core.results.collect import collect
from fmp_core.results.paper import FIGURES, SCALES, TABLES, compare, comparison_text, draw_figure, sweep_content
from fmp_core.results.tables import printable
from fmp_core.storage.files import replacing, write_text
from fmp_core.sweeps.jobs import read_stamp
from fmp_core.sweeps.plan import make_sweep
from sweep import run_sweep


def run_missing(args: argparse.Namespace, tables: list[str]) -> int:
    """Run the sweep behind ``tables``. Raises UserError as a sweep does."""
    root = Path(args.record_root)
    by_hand = [name for name in find_records(root) if not read_stamp(root / name)]
    content = sweep_content(tables, SCALES[args.scale], args.backdoorbench, by_hand)
    where = {"record_root": args.record_root, "dataset_path": args.dataset_path, "device": args.device}
    content |= {**where, "workers": args.workers, "seeds": args.seeds}
    return run_sweep(make_sweep(content, "paper_tables"), args.launcher, args.dry_run)


def show(args: argparse.Namespace, tables: list[str]) -> None:
    """Print the comparison, and write the files that were asked for."""
    frame = collect(args.record_root, lambda line: print(f"paper_tables: {printable(line)}", file=sys.stderr))
    scale = SCALES[args.scale]
    compared = {table: compare(table, scale, frame) for table in tables}
    for table, part in compared.items():
        print(comparison_text(table, scale, part))
    if args.csv:
        with replacing(args.csv) as temporary:
            parts = [part.assign(table=table, scale=scale.name) for table, part in compared.items()]
            pd.concat(parts).to_csv(temporary, index=False)
    if args.markdown:
        write_text(args.markdown, "\n".join(comparison_text(t, scale, part, markdown=True) for t, part in compared.items()))
    for number in args.figure:
        path = Path(args.output) / f"figure_{number}_{scale.name}.png"
        draw_figure(path, number, scale, compared[FIGURES[number]])
        print(f"figure {number}: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=[], choices=TABLES)
    parser.add_argument("--figure", nargs="+", default=[], choices=FIGURES)
    parser.add_argument("--scale", choices=SCALES, default="full", help="; ".join(scale.says for scale in SCALES.values()))
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--backdoorbench", help="root of a checkout; without it only FMP and fine-tuning are run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time on the CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what would run")
    parser.add_argument("--no-run", action="store_true", help="show the results that are there")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--output", default=".", help="folder of the figures")
    args = parser.parse_args(argv)
    tables = list(dict.fromkeys([*args.table, *(FIGURES[number] for number in args.figure)]))
    if not tables:
        parser.error("name a --table or a --figure")
    try:
        code = 0 if args.no_run else run_missing(args, tables)
        if not args.dry_run:
            show(args, tables)
    except UserError as error:
        print(f"paper_tables: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper_tables: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
