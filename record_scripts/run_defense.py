#!/usr/bin/env python3
"""Run BackdoorBench's own defenses and analyses on a record, on today's torch and numpy; no file of it is touched.

    python record_scripts/run_defense.py --backdoorbench ~/BackdoorBench --defense ft --result_file badnet -- --epochs 10
    python record_scripts/run_defense.py --backdoorbench ~/BackdoorBench --defense fmp --analysis tsne --result_file badnet

The first runs ``defense/ft.py``. The second runs ``analysis/visual_tsne.py`` on what a defense, here FMP, made of the record.
Dataset and model are taken from the record. What follows ``--`` is handed to BackdoorBench's script as it is. Results lie
where BackdoorBench puts them, ``record/<name>/defense/<method>/``, with all that was printed in ``run_defense.log`` (or
``visual_tsne.log``). The exit code is the script's, or 2 if it could not be started.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.backdoorbench.run import run_on_record
from fmp_core.backdoorbench.workspace import add_job_flags, job_of
from fmp_core.system import cli

ROOT = Path(__file__).absolute().parents[1]  # a BackdoorBench checkout, if install.py put this script there


class Parser(cli.Parser):
    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; flags of BackdoorBench's script go last, after --, as in ... -- --epochs 10")


@cli.if_it_ends_early("an earlier result stays as it was; without one, what BackdoorBench has written so far stays")
def run(args: Namespace, extra: list[str]) -> int:
    message, code = run_on_record(job_of(args), args.defense, args.analysis, args.python, extra, args.test_images, args.dtype)
    print(f"run_defense: {message}", file=sys.stderr if code else sys.stdout)
    return code


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("run_defense", __doc__, usage="%(prog)s --defense NAME --result_file RECORD [...] [-- BB'S FLAGS]")
    parser.add_argument("--defense", metavar="NAME", required=True, help="ft, fp, clp, anp, nc, nad, rnp, ft-sam, i-bau, ...")
    parser.add_argument("--analysis", metavar="NAME", help="cm, metric, network, tac, tsne, ... of what --defense has left")
    parser.add_argument(
        "--test_images", type=int, metavar="N",
        help="test on N images only while a defense runs, and at its end on all; saves much time on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32",
        help="bf16: on a CPU with AMX or AVX512-bf16 a defense takes about half the time; BackdoorBench tests in bf16, too",
    )  # fmt: skip
    add_job_flags(parser, ROOT)
    args = parser.parse_args(argv[:end])
    if args.test_images is not None and args.test_images < 1:
        parser.error("--test_images must be at least 1")
    return cli.run_main("run_defense", lambda: run(args, argv[end + 1 :]), effect="begin anew")


if __name__ == "__main__":
    sys.exit(main())
