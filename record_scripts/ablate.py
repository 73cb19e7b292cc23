#!/usr/bin/env python3
"""What does each part of FMP do? The same clean subset and fine-tuning after different selections of the maps to prune.

    python record_scripts/ablate.py --result_file badnet_cifar10 blended_cifar10 --frequency_test 0
    python record_scripts/ablate.py --result_file badnet_cifar10 --rows ft layer oracle --epochs 3 --test_images 2000

The paper's method: ``ft`` fine-tuning only; ``random-1..3`` as many maps per layer as ``layer``, at random; ``layer`` FMP as
released; ``global`` FMP as in the paper's text; ``oracle`` prunes the maps whose activation the real trigger changes most (it
uses the poisoned test set, so it is no defense); ``layer-pruned``, ``oracle-pruned`` the same without fine-tuning.

Our preset: ``strong``; ``strong-pruned`` without fine-tuning; ``strong-moved`` without fine-tuning and with N/p of each layer
instead of the budget. ``strong`` without one part: ``strong-unpruned``, ``strong-random`` (as many maps of each layer, at
random), ``strong-unmasked``, ``strong-clean`` (no unlearning), ``strong-undistilled``, ``strong-uninterpolated``.

Other flags are FMP's. Each row is a run in ``record/<name>/defense/ablate-<row>``; rows finished with the same settings and
versions are not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.settings import add_arguments
from fmp_core.system.cli import Parser, run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("ablate", __doc__)
    parser.add_argument("--result_file", nargs="+", required=True, metavar="RECORD", help="attack records")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="the rows to run (default: all)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the tables of all records there")
    args, rest = parser.parse_known_args(argv)
    fmp_parser = Parser("ablate")
    add_arguments(fmp_parser)
    flags = {key: value for key, value in vars(fmp_parser.parse_args(rest)).items() if value is not None}
    return run_main("ablate", lambda: run(args.result_file, args.rows, args.csv, flags))


def run(records: list[str], rows: list[str] | None, csv: Path | None, flags: dict[str, str]) -> None:
    from fmp import FMP  # loads torch
    from fmp_core.results.ablation import ablate_records

    ablate_records(records, rows, flags, FMP, csv)


if __name__ == "__main__":
    sys.exit(main())
