#!/usr/bin/env python3
"""Gather the results of all defenses of all records into one table.

    python record_scripts/collect.py                                  # ./record, printed
    python record_scripts/collect.py record --csv results.csv --html results.html --latex results.tex
    python record_scripts/collect.py record --leaderboard backdoorbench_leaderboard.csv     # published rows beside ours

Reads ``record/*/defense/*``, ours and BackdoorBench's. The csv and parquet files hold fractions, the printed tables percent.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.errors import UserError
from fmp_core.results.collect import collect, join_leaderboard, read_leaderboard
from fmp_core.results.html_tables import to_html
from fmp_core.results.tables import Table, build_tables, printable, to_latex, to_markdown, to_text
from fmp_core.storage.files import replacing, write_text


def warn(text: str) -> None:
    print(f"collect: {printable(text)}", file=sys.stderr)


def write_tables(args: argparse.Namespace, tables: Sequence[Table]) -> None:
    if args.markdown:
        write_text(args.markdown, "\n".join(map(to_markdown, tables)))
    if args.latex:
        write_text(args.latex, "\n".join(map(to_latex, tables)))
    if args.html:
        write_text(args.html, to_html(tables))


def run(args: argparse.Namespace) -> None:
    """Raises UserError: no such folder, no results at all, or a file cannot be written."""
    frame = collect(args.record_root, warn)
    if frame.empty:
        raise UserError(f"There are no defense results below {args.record_root}; run a defense first.")
    if args.leaderboard:
        joined = join_leaderboard(frame, read_leaderboard(args.leaderboard))
        if len(joined) == len(frame):
            warn("no leaderboard row has the dataset, model, attack and poison rate of a record here")
        frame = joined
    tables = build_tables(frame)
    try:
        if args.csv:
            with replacing(args.csv) as temporary:
                frame.to_csv(temporary, index=False)
        if args.parquet:
            with replacing(args.parquet) as temporary:
                frame.to_parquet(temporary)
        write_tables(args, tables)
    except ImportError:
        raise UserError("--parquet needs pyarrow; run: pip install pyarrow") from None
    except OSError as error:
        raise UserError(f"An output file cannot be written ({error}); choose another name.") from None
    width = shutil.get_terminal_size((128, 40)).columns
    print("\n".join(to_text(table, width) for table in tables))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record_root", nargs="?", default="./record", help="the folder of attack records (default ./record)")
    for name, what in (
        ("csv", "tidy table, fractions"),
        ("parquet", "the same as parquet (needs pyarrow)"),
        ("markdown", "tables, percent"),
        ("latex", "booktabs tables, percent"),
        ("html", "a page with sortable tables"),
        ("leaderboard", "BackdoorBench's leaderboard csv; its rows are labelled published"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
