"""What is known of an attack record before training: settings that go together, the dataset, and the poisoned images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fmp_core.attacks.poisoning import Poison, limit_train, poison
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.attacks.train_model import recipe
from fmp_core.data.datasets import FACTS, DatasetFacts, Split, dataset_facts, open_split
from fmp_core.data.digits import make_digits
from fmp_core.data.images import Size
from fmp_core.errors import UserError
from fmp_core.models.build import build_model
from fmp_core.settings import Settings


@dataclass(frozen=True)
class Plan:
    """A record to be made.

    Args:
        training: how the model is trained, the dataset's recipe filled in.
        used: positions of the training images that the model is trained on.
        poison: None if ``attack.attack`` is none.
    """

    record: RecordSettings
    attack: AttackSettings
    training: Settings
    facts: DatasetFacts
    num_classes: int
    train_set: Split
    test_set: Split
    used: Sequence[int]
    poison: Poison | None

    @property
    def folder(self) -> Path:
        return record_folder(self.record, self.attack)

    @property
    def unfinished(self) -> Path:
        """The folder until the record is whole."""
        return self.folder.with_name(f".{self.folder.name}.unfinished")


def record_folder(record: RecordSettings, attack: AttackSettings) -> Path:
    """Where the record is going to lie."""
    return Path(record.record_root) / (record.save_folder_name or f"{attack.attack}_{record.dataset}")


def make_plan(record: RecordSettings, attack: AttackSettings, training: dict[str, object]) -> Plan:
    """Check that the settings go together, read the dataset and poison it. Nothing is written but ``data/digits``.

    Args:
        training: the settings of training that were given.

    Raises:
        UserError: the record exists already, the model cannot be trained on the dataset, or a setting, the dataset or a
            trigger file is not usable.
    """
    folder = record_folder(record, attack)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or choose another --save_folder_name.")
    if training.get("epochs") == 0:
        raise UserError("--epochs is 0, but a model must be trained for at least one epoch.")
    known = FACTS.get(record.dataset)
    size = known.size if known else (record.image_size, record.image_size, 3)
    facts = dataset_facts(record.dataset, size)
    network = check_model(record.model, facts.num_classes or 2, record.dataset, size)
    settings = Settings(**{**recipe(record.dataset, network), **training})
    if record.dataset == "digits":
        make_digits(Path(record.dataset_path) / "digits")
    train_set, test_set = (open_split(record.dataset_path, record.dataset, train, size) for train in (True, False))
    num_classes = facts.num_classes or int(train_set.labels.max()) + 1
    attack.check(num_classes)
    if record.limit_train is not None and record.limit_train > len(train_set):
        raise UserError(f"--limit_train is {record.limit_train}, but {record.dataset} has {len(train_set)} training images.")
    seed = settings.random_seed
    used = limit_train(len(train_set), record.limit_train, seed)
    none = attack.attack == "none"
    poisoned = None if none else poison(train_set, test_set, attack, size, num_classes, seed, used)
    return Plan(record, attack, settings, facts, num_classes, train_set, test_set, used, poisoned)


def check_model(name: str, num_classes: int, dataset: str, size: Size) -> nn.Module:
    """The model ``name`` without weights (on torch's meta device), if it can be trained on images of this size.

    Raises:
        UserError: no model of BB's, or not for such images: too few pixels (alexnet at 32x32), one channel (BB's models take
            three), or several outputs in training (inception_v3).
    """
    with torch.device("meta"):  # takes no time and draws no random number
        network = build_model(name, num_classes)
        images = torch.empty(2, size[2], *size[:2])
    shown = f"{size[0]}x{size[1]}x{size[2]}"
    try:
        output = network(images)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Model {name} cannot be trained on {dataset}, whose images are {shown} ({reason}); "
            "choose another --model or --dataset."
        ) from None
    if not isinstance(output, torch.Tensor):
        raise UserError(
            f"Model {name} has several outputs in training, which this script does not train; choose another --model."
        )
    return network
