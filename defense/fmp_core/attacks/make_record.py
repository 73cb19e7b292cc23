"""Making an attack record: poison, train, write the folder in BackdoorBench's format."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fmp_core.attacks.plan import Plan, make_plan
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.attacks.train_model import AttackEpoch, CleanMetrics, clean_metrics, train_attacked_model, training_set
from fmp_core.data.write_record import write_attack_record
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.evaluate import Metrics, TestData, evaluate
from fmp_core.results.bb_tables import history_frame, summary_frame, write_csv, write_plots
from fmp_core.settings import training_settings
from fmp_core.storage.checkpoint import Checkpoint, content_key
from fmp_core.storage.files import make_folders, write_torch
from fmp_core.system import logs
from fmp_core.system.devices import choose_device, make_deterministic

LOGGER = logging.getLogger("fmp_core")
History = list[tuple[dict[str, Any], dict[str, Any]]]  # the fields of an epoch, and of its test


def make_record(record: RecordSettings, attack: AttackSettings, training: dict[str, object]) -> Path:
    """Poison, train, save. Returns the record folder, which appears whole (``.<name>.unfinished`` until then).

    Args:
        training: the settings of training that were given; others follow the dataset's recipe.

    Raises:
        UserError: see :func:`~fmp_core.attacks.plan.make_plan`; or an unfinished record was made with other settings, or
            training diverged.
    """
    device = choose_device(str(training.get("device", "auto")))
    plan = make_plan(record, attack, training)
    make_deterministic()
    torch.manual_seed(plan.training.random_seed)
    network = build_model(record.model, plan.num_classes)
    model = PixelModel(network, plan.facts).to(device.device).to(memory_format=torch.channels_last)
    data = training_set(plan.train_set, plan.used, plan.poison)
    checkpoint = _prepare_folder(plan, content_key({}, data.images, data.labels, {}))
    logs.set_up(plan.unfinished, plan.training, {**checkpoint.made_with, "device": device.name})
    try:
        poisoned = len(plan.poison.train.indices) if plan.poison else 0
        LOGGER.info("%d of %d training images get the trigger", poisoned, len(plan.used))
        LOGGER.info("%s is trained for %d epochs on %s", record.model, plan.training.epochs, device.name)
        measure = _measurement(plan, model, device.device)
        data = data.to(device.device)
        history = train_attacked_model(model, data, measure, plan.training, device, plan.facts, checkpoint)
        write_record(plan, network.state_dict(), history)
    finally:
        logs.close()
    plan.unfinished.rename(plan.folder)
    Checkpoint(plan.folder / "training.pt", {}).remove()
    return plan.folder


def _prepare_folder(plan: Plan, images: str) -> Checkpoint:
    """Make the unfinished folder, or clear the one that is there; ``images`` is a digest of the training images."""
    if plan.record.fresh:
        shutil.rmtree(plan.unfinished, ignore_errors=True)
    make_folders(plan.unfinished)
    for leftover in plan.unfinished.glob(".*"):  # of a run that was killed while it wrote a file
        leftover.unlink()
    made_with = {"model": plan.record.model, "dataset": plan.record.dataset, "limit_train": plan.record.limit_train}
    made_with |= dataclasses.asdict(plan.attack)
    made_with |= {name: getattr(plan.training, name) for name in training_settings() if name != "device"}
    return Checkpoint(plan.unfinished / "training.pt", {**made_with, "training images": images[:16]})


def _measurement(plan: Plan, model: PixelModel, device: torch.device) -> Callable[[], Metrics | CleanMetrics]:
    images, labels = plan.test_set.read(range(len(plan.test_set))).to(device), plan.test_set.labels.to(device)
    batch_size = plan.training.batch_size
    if plan.poison is None:
        return lambda: clean_metrics(model, images, labels, batch_size)
    bad = plan.poison.test
    targets, original = (torch.tensor(part, device=device) for part in (bad.targets, bad.original))
    data = TestData(images, labels, bad.images.to(device), targets, original)
    return lambda: evaluate(model, data, batch_size).metrics


def write_record(plan: Plan, state: dict[str, Tensor], history: History) -> None:
    """Write what BB's attack scripts leave into the unfinished folder, ``attack_result.pt`` last.

    A model that never saw a trigger is also saved as ``clean_model.pth``, as BB's ``prototype.py`` does. Without an attack
    there is nothing else: a record whose poisoned test set is not one would only mislead.
    """
    folder = plan.unfinished
    write_torch(folder / "info.pickle", _info(plan))
    cpu_state = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
    if plan.poison is None or not plan.poison.train.indices:
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
        model_name=plan.record.model,
        num_classes=plan.num_classes,
        state=cpu_state,
        dataset=plan.record.dataset,
        bd_train=plan.poison.recorded_train(),
        bd_test=plan.poison.test,
    )


def _info(plan: Plan) -> dict[str, Any]:
    """``info.pickle``: the settings under BB's names, and what follows from the dataset."""
    record, size = plan.record, plan.facts.size
    info = {**dataclasses.asdict(record), **dataclasses.asdict(plan.attack), "attack": plan.attack.bb_name}
    info |= {name: getattr(plan.training, name) for name in training_settings()}
    info |= {"num_classes": plan.num_classes, "img_size": size, "terminal_info": sys.argv}
    info |= dict(zip(("input_height", "input_width", "input_channel"), size, strict=True))
    info |= {"save_folder_name": plan.folder.name, "save_path": f"./record/{plan.folder.name}"}
    return info | {"dataset_path": f"{record.dataset_path}/{record.dataset}"}
