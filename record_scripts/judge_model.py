#!/usr/bin/env python3
"""Is this model backdoored? A verdict from its weights and clean images, without BackdoorBench and without triggered images.

    python record_scripts/judge_model.py model.pth --model resnet18 --dataset images/mine
    python record_scripts/judge_model.py model.pth --model vgg19_bn --dataset cifar10 --mean 0.5 --std 0.5

The dataset is one that BackdoorBench knows, or a folder {train,test}/<class>/* whose folders, in alphabetical order, are the
model's classes. About 130 clean training images are needed (150 of five or six classes, 160 of four, 180 of three, 250 of two),
and 1000 are better. The model is put into a record, record/<file's name>, which defense/fmp.py can repair: the last line
printed says how. verdict.json there says the outcome to programs; the exit code is 0 whatever it is. docs/results.md says how
far to trust a verdict.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.attacks.settings import RecordSettings
from fmp_core.errors import UserError
from fmp_core.fields import add_flags, parse_flags
from fmp_core.settings import Settings
from fmp_core.system.cli import Parser, run_main

RECORD = ("model", "dataset", "dataset_path", "image_size", "save_folder_name", "record_root")
RUN = ("mean", "std", "ratio", "random_seed", "device", "dtype", "fresh", "quiet", "log_level")
HELP = {  # where other programs' words do not fit
    "dataset": "required: a folder {train,test}/<class>/*, or cifar10, cifar100, gtsrb, tiny, ... below --dataset_path",
    "save_folder_name": "the record's name (default: the file's)",
    "ratio": "share of the clean training images that is used (default 0.1, more where that is below 1000 images)",
}


def run(model_file: str, flags: dict[str, str | None]) -> None:
    if flags["dataset"] is None:
        raise UserError("--dataset is missing: name the folder of clean images, or a dataset that BackdoorBench knows.")
    record = RecordSettings(**parse_flags(RecordSettings, {name: flags[name] for name in RECORD}))
    settings = parse_flags(Settings, {name: flags[name] for name in RUN})

    from fmp_core.judge import judge_model  # imports torch, which takes seconds

    print("\n".join(["", *judge_model(Path(model_file), record, settings)]))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("judge_model", __doc__)
    parser.add_argument("model_file", metavar="FILE", help="the weights, as torch.save(model.state_dict(), FILE) writes them")
    add_flags(parser.add_argument_group("model and data"), RecordSettings, RECORD, HELP)
    add_flags(parser.add_argument_group("the run"), Settings, RUN, HELP, defaults=False)
    args = parser.parse_args(argv)
    flags = {key: value for key, value in vars(args).items() if key != "model_file"}
    return run_main("judge_model", lambda: run(args.model_file, flags))


if __name__ == "__main__":
    sys.exit(main())
