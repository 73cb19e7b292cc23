#!/usr/bin/env python3
"""Make a genuine attack record without BackdoorBench.

    python record_scripts/make_record.py                       # BadNets on scikit-learn's digits, resnet18
    python record_scripts/make_record.py --attack wanet --dataset cifar10 --model preactresnet18
    python record_scripts/make_record.py --dataset cifar10 --limit_train 2000     # a quick record that BackdoorBench reads, too
    python record_scripts/make_record.py --pratio 0 --save_folder_name control    # the model never saw the trigger

poisons the training set, trains the model, and writes ``record/<save_folder_name>/`` in BackdoorBench's format. A killed run
goes on from its last finished epoch when repeated. The digits come with scikit-learn and are laid out as an image folder below
``data/digits`` (BackdoorBench does not know them); any other dataset must lie below ``--dataset_path`` as BackdoorBench keeps
it, or be named by its path. docs/records.md describes the attacks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.attacks.recipes import in_words
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.fields import add_flags, parse_flags
from fmp_core.settings import Settings, training_settings
from fmp_core.system.cli import Parser, run_main

TRAINING = (*training_settings(), "quiet", "log_level")
HELP = {  # where fmp.py's words do not fit
    "epochs": "training epochs",
    "batch_size": "batch size of training and testing",
    "random_seed": "seed of the poisoned images and of training",
}


def run(flags: dict[str, str | None]) -> None:
    started = time.monotonic()
    record, attack = RecordSettings(**parse_flags(RecordSettings, flags)), AttackSettings(**parse_flags(AttackSettings, flags))
    training = parse_flags(Settings, {name: flags[name] for name in TRAINING})

    from fmp_core.attacks.make_record import make_record  # imports torch, which takes seconds

    folder = make_record(record, attack, training)
    print(f"record written to {folder} in {time.monotonic() - started:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("make_record", f"{__doc__}\n{in_words()}")
    add_flags(parser.add_argument_group("record"), RecordSettings)
    add_flags(parser.add_argument_group("attack"), AttackSettings)
    training = parser.add_argument_group("training (epochs, batch size and learning rate default to the dataset's recipe)")
    add_flags(training, Settings, TRAINING, HELP, defaults=False)
    args = parser.parse_args(argv)
    return run_main("make_record", lambda: run(vars(args)))


if __name__ == "__main__":
    sys.exit(main())
