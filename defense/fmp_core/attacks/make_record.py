"""Making an attack record: poison, train, write the folder in BackdoorBench's format."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fmp_core import attacks, models
from fmp_core.attacks.poisoning import Poison, limit_train, poison
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.attacks.train_model import AttackEpoch, History, clean_metrics, recipe, train_attacked_model, training_set
from fmp_core.data.datasets import (
    DATASET_NAME,
    FACTS,
    DatasetFacts,
    Split,
    check_labels,
    dataset_facts,
    dataset_folder,
    known_name,
    open_split,
)
from fmp_core.data.digits import make_digits
from fmp_core.data.images import Size
from fmp_core.data.write_record import AttackedModel, write_attack_record
from fmp_core.errors import UserError, in_one_line
from fmp_core.models.build import PixelModel, build_model, outputs_in_training
from fmp_core.models.evaluate import Metrics, TestData, evaluate
from fmp_core.models.training import training_precision
from fmp_core.results.bb_tables import history_frame, summary_frame, write_csv, write_plots
from fmp_core.settings import Settings, training_settings
from fmp_core.storage.checkpoint import Checkpoint, content_key
from fmp_core.storage.files import make_folders, write_torch
from fmp_core.storage.lock import locked
from fmp_core.system import logs
from fmp_core.system.devices import Device, as_in_a_fresh_process, choose_device
from fmp_core.system.versions import source_digest

LOGGER = logging.getLogger("fmp_core")
TRAINING_CODE = source_digest(attacks, models)[:16]
LOCK = "making.lock"  # in the unfinished folder
WEAK_ASR = 0.5  # share of triggered images that get the target
STRONGER = "Make the record again with more --epochs or a higher --pratio (badnet: also a larger --patch_size)"
ANOTHER = "Another make_record.py makes {record} now; wait for its end, or choose another --save_folder_name."


@dataclass(frozen=True)
class Plan:
    """All that is known of a record before training."""

    record: RecordSettings
    attack: AttackSettings
    folder: Path  # where the record is going to lie; until it is whole, it is in ``unfinished``
    training: Settings  # the dataset's recipe filled in
    facts: DatasetFacts
    num_classes: int
    train_set: Split
    test_set: Split
    used: Sequence[int]  # positions of the training images that the model is trained on
    poison: Poison | None  # None if the attack is none

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.unfinished")


@as_in_a_fresh_process()
def make_record(record: RecordSettings, attack: AttackSettings, training: dict[str, object]) -> Path:
    """Poison, train, save. Returns the record folder, which appears whole (``.<name>.unfinished`` until then).

    ``training`` are the settings of training that were given; others follow the dataset's recipe. Raises UserError as
    :func:`make_plan`, and if an unfinished record was made with other settings, or training diverges.
    """
    device = choose_device(str(training.get("device", "auto")))
    plan = make_plan(record, attack, training)
    with locked(plan.unfinished, False, ANOTHER.format(record=plan.folder), LOCK):
        if plan.folder.exists():  # another process made it meanwhile
            shutil.rmtree(plan.unfinished)
        _refuse_existing(plan.folder)
        _make(plan, device)
        (plan.folder / LOCK).unlink()
    return plan.folder


def _make(plan: Plan, device: Device) -> None:
    """Train the planned model and write its record."""
    record = plan.record
    torch.manual_seed(plan.training.random_seed)
    network = build_model(record.model, plan.num_classes)
    model = PixelModel(network, plan.facts).on(device.device)
    data = training_set(plan.train_set, plan.used, plan.poison)
    tested = _test_images(plan)
    precision = training_precision(plan.training, device.device)
    checkpoint = _prepare_folder(plan, content_key(tested, data.images, data.labels, {}), precision)
    logs.set_up(plan.unfinished, plan.training, {**checkpoint.made_with, "device": device.name})
    try:
        poisoned = len(plan.poison.train.indices) if plan.poison else 0
        for name in plan.attack.unused:
            LOGGER.warning("--%s changes nothing of --attack %s", name, plan.attack.attack)
        LOGGER.info("%d of %d training images get the trigger", poisoned, len(plan.used))
        LOGGER.info("%s is trained for %d epochs on %s", record.model, plan.training.epochs, device.name)
        measure = _measurement(plan, model, {name: part.to(device.device) for name, part in tested.items()})
        history = train_attacked_model(model, data, measure, plan.training, device, plan.facts, checkpoint)
        if poisoned and (asr := history[-1][1]["test_asr"]) < WEAK_ASR:
            LOGGER.warning("the backdoor is weak: ASR is %.1f %%. %s", 100 * asr, STRONGER)
        write_record(plan, network.state_dict(), history)
    finally:
        logs.close()
    plan.unfinished.rename(plan.folder)
    Checkpoint(plan.folder / "training.pt", {}).remove()


def make_plan(record: RecordSettings, attack: AttackSettings, training: dict[str, object]) -> Plan:
    """Check that the settings go together, read the dataset and poison it. Nothing is written but ``data/digits``.

    Raises UserError if the record exists already, or the model, a setting, the dataset or a trigger file is not usable.
    """
    record = with_dataset_name(record)
    folder = Path(record.record_root) / (record.save_folder_name or f"{attack.attack}_{record.dataset}")
    _refuse_existing(folder)
    if training.get("epochs") == 0:
        raise UserError("--epochs is 0, but a model must be trained for at least one epoch.")
    size = image_size_of(record)
    facts = dataset_facts(record.dataset, size)
    network = check_model(record.model, facts.num_classes or 2, record.dataset, size)
    settings = Settings(**{**recipe(record.dataset, network), **training})
    if record.dataset == "digits":
        make_digits(Path(record.dataset_path) / "digits")
    train_set, test_set = (open_split(record.dataset_path, record.dataset, train, size) for train in (True, False))
    num_classes = facts.num_classes or int(train_set.labels.max()) + 1
    for split in (train_set, test_set):
        check_labels(split, num_classes, record.dataset)
    if num_classes < 2:
        raise UserError(f"{record.dataset} has images of one class only; a classifier needs two.")
    attack.check(num_classes)
    if record.limit_train is not None and record.limit_train > len(train_set):
        raise UserError(f"--limit_train is {record.limit_train}, but {record.dataset} has {len(train_set)} training images.")
    seed = settings.random_seed
    used = limit_train(len(train_set), record.limit_train, seed)
    poisoned = None if attack.attack == "none" else poison(train_set, test_set, attack, size, num_classes, seed, used)
    return Plan(record, attack, folder, settings, facts, num_classes, train_set, test_set, used, poisoned)


def image_size_of(record: RecordSettings) -> Size:
    """Height, width and channels. Raises UserError: ``image_size`` contradicts a dataset that BackdoorBench knows."""
    known = FACTS.get(record.dataset)
    side = record.image_size or 32
    size = known.size if known else (side, side, 3)
    if record.image_size and size[:2] != (side, side):
        raise UserError(
            f"--image_size is {side}, but BackdoorBench has {record.dataset} at {size[0]}x{size[1]}; leave it out, or "
            "give the dataset's folder another name."
        )
    return size


def with_dataset_name(record: RecordSettings) -> RecordSettings:
    """``record`` with its dataset as a record calls it. A path given as ``--dataset`` is split: a record holds a name only."""
    path = Path(record.dataset)
    is_path = path.name != record.dataset.rstrip("/")  # "cifar10/" is a name
    if is_path:
        record = replace(record, dataset_path=str(path.parent))
    name = known_name(path.name) or path.name
    if not re.fullmatch(DATASET_NAME, path.name):
        raise UserError(f"--dataset {path} is no name that a record can hold: letters, digits, '.', '_', '-' and spaces.")
    if is_path and path.is_dir() and not dataset_folder(path.parent, name).samefile(path):
        raise UserError(f"--dataset {path} would be read from {path.parent / name}, which has the same name; move one of them.")
    return replace(record, dataset=name)


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):  # or a link to nothing
        raise UserError(f"{folder} exists already; remove it or choose another --save_folder_name.")


def check_model(name: str, num_classes: int, dataset: str, size: Size) -> nn.Module:
    """The model ``name`` without weights (on torch's meta device). Raises UserError if it cannot be trained on such images: too
    few pixels (alexnet at 32x32), one channel (BB's models take three), or several outputs in training (inception_v3)."""
    with torch.device("meta"):  # takes no time and draws no random number
        network = build_model(name, num_classes)
    try:
        output = outputs_in_training(network, size)
    except (RuntimeError, ValueError) as error:
        shown = "x".join(map(str, size))
        raise UserError(
            f"Model {name} cannot be trained on {dataset}, whose images are {shown} ({in_one_line(error)}); "
            "choose another --model or --dataset."
        ) from None
    if not isinstance(output, Tensor):
        raise UserError(
            f"Model {name} has several outputs in training, which this script does not train; choose another --model."
        )
    return network


def _prepare_folder(plan: Plan, images: str, precision: torch.dtype) -> Checkpoint:
    """Make the unfinished folder, or clear the one that is there.

    ``images`` is a digest of training and test images, ``precision`` that of the training.
    """
    record, folder = plan.record, plan.unfinished
    make_folders(folder)
    for leftover in folder.iterdir():
        partial = leftover.name.startswith(".")  # of a run that was killed while it wrote a file
        if partial or (record.fresh and leftover.name != LOCK):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    made_with = {"model": record.model, "dataset": record.dataset, "limit_train": record.limit_train, **asdict(plan.attack)}
    made_with |= {name: getattr(plan.training, name) for name in training_settings() if name != "device"}
    made_with |= {"precision": str(precision), "digest of images": images[:16], "digest of the code": TRAINING_CODE}
    return Checkpoint(folder / "training.pt", made_with)


def _test_images(plan: Plan) -> dict[str, Tensor]:
    """What the model is tested on, under the names of :class:`~fmp_core.models.evaluate.TestData`."""
    clean = {"clean_images": plan.test_set.read(range(len(plan.test_set))), "clean_labels": plan.test_set.labels}
    if plan.poison is None:
        return clean
    bad = plan.poison.test
    return {
        **clean,
        "poisoned_images": bad.images,
        "targets": torch.tensor(bad.targets),
        "originals": torch.tensor(bad.original),
    }


def _measurement(plan: Plan, model: PixelModel, tested: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    batch_size = plan.training.batch_size
    if plan.poison is None:
        return lambda: clean_metrics(model, tested["clean_images"], tested["clean_labels"], batch_size)
    data = TestData(**tested)
    return lambda: asdict(evaluate(model, data, batch_size).metrics)


def write_record(plan: Plan, state: dict[str, Tensor], history: History) -> None:
    """Write what BB's attack scripts leave into the unfinished folder, ``attack_result.pt`` last.

    A model that never saw a trigger is also saved as ``clean_model.pth``, as BB's ``prototype.py`` does. Without an attack
    there is nothing else: a record whose poisoned test set is not one would only mislead.
    """
    folder = plan.unfinished
    write_torch(folder / "info.pickle", _info(plan))
    if plan.poison is None or not plan.poison.train.indices:
        cpu_state = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
        write_torch(folder / "clean_model.pth", cpu_state)
    if plan.poison is None:
        rows = [{"epoch": epoch["epoch"], "batch": epoch["batch"], **metrics} for epoch, metrics in history]
        write_csv(folder / "attack_df.csv", pd.DataFrame(rows, dtype=object))
        return
    frame = history_frame([(AttackEpoch(**epoch), Metrics(**metrics)) for epoch, metrics in history])
    frame = frame.dropna(axis="columns", how="all")  # BB leaves out what is always None: accuracies of no poisoned images
    write_csv(folder / "attack_df.csv", frame)
    write_csv(folder / "attack_df_summary.csv", summary_frame(frame))
    write_plots(folder, frame)
    indicator = np.zeros(len(plan.train_set))
    indicator[plan.poison.train.indices] = 1
    write_torch(folder / "train_poison_index_list.pickle", indicator)
    write_attack_record(
        folder,
        name=plan.folder.name,
        model=AttackedModel(plan.record.model, plan.num_classes, state),
        dataset=plan.record.dataset,
        bd_train=plan.poison.recorded_train(),
        bd_test=plan.poison.test,
    )


def _info(plan: Plan) -> dict[str, Any]:
    """``info.pickle``: the settings under BB's names, and what follows from the dataset."""
    record, size, name = plan.record, plan.facts.size, plan.folder.name
    poisons = asdict(plan.attack) if plan.poison else {}
    info = {**asdict(record), "image_size": size[0], **poisons, "attack": plan.attack.bb_name}
    info |= {setting: getattr(plan.training, setting) for setting in training_settings()}
    info |= {"num_classes": plan.num_classes, "img_size": size, "terminal_info": sys.argv}
    info |= dict(zip(("input_height", "input_width", "input_channel"), size, strict=True))
    info |= {"save_folder_name": name, "save_path": f"./record/{name}"}
    return info | {"dataset_path": f"{record.dataset_path}/{record.dataset}"}
