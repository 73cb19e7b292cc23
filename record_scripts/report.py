#!/usr/bin/env python3
"""Write report.html about a finished run, from the files it left.

    python record_scripts/report.py --result_file badnet_cifar10 [--compare ft fp]

reads ``record/<result_file>/`` (the attack) and ``record/<result_file>/defense/<defense_name>/`` (the run) and writes
``report.html`` into the latter. Predictions the run did not keep are made again, which takes two tests of the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.data.attack_record import AttackRecord, read_attack_record
from fmp_core.data.datasets import open_split
from fmp_core.errors import UserError
from fmp_core.models.evaluate import TestData
from fmp_core.report.page import write_report
from fmp_core.storage.files import refuse_links_out_of
from fmp_core.system.devices import choose_device


def read_test_data(record: AttackRecord, dataset_path: str, device: str) -> TestData:
    """Both test sets of ``record`` on ``device``. Raises UserError where they cannot be read."""
    test_set = open_split(dataset_path, record.dataset, False, record.image_size)
    tensors = (
        test_set.read(range(len(test_set))),
        test_set.labels,
        record.bd_test.pixels(record.image_size),
        record.bd_test.targets,
        record.bd_test.true_labels(test_set),
    )
    where = choose_device(device).device
    return TestData(*(tensor.to(where) for tensor in tensors))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result_file", required=True, help="the attack record: a folder name below --record_root")
    parser.add_argument("--defense_name", default="fmp", help="the run: a folder name below <record>/defense (default fmp)")
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="other folders beside it, for a table")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        record = read_attack_record(Path(args.record_root) / args.result_file)
        folder = record.folder / "defense" / args.defense_name
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; run the defense first, or check --defense_name.")
        refuse_links_out_of(record.folder, folder)
        path = write_report(record, folder, read_test_data(record, args.dataset_path, args.device), args.compare)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
