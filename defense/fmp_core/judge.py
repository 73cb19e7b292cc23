"""A suspicious model without an attack record: put into one, tested on clean images, and judged from these alone."""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core.attacks.make_record import with_dataset_name
from fmp_core.attacks.settings import RecordSettings
from fmp_core.data.attack_record import ATTACK_FILE, read_attack_record
from fmp_core.data.datasets import FACTS, DatasetFacts, Split, check_labels, dataset_facts, open_split
from fmp_core.data.write_record import write_attack_record
from fmp_core.errors import UserError
from fmp_core.fields import as_text
from fmp_core.inputs import Inputs, describe, load_inputs
from fmp_core.inversion.trigger import ALL_TO_ALL
from fmp_core.inversion.verdict import LEAST_MARGIN, Verdict
from fmp_core.models.build import PixelModel, load_model
from fmp_core.models.evaluate import even_sample, predict
from fmp_core.results.run_folder import RunFolder
from fmp_core.selection.select import test_for_backdoor
from fmp_core.settings import Settings, load_settings
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system import logs
from fmp_core.system.cli import Stages
from fmp_core.system.devices import choose_device, make_deterministic

LOGGER = logging.getLogger("fmp_core")
NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")  # where training scripts keep the weights
ENOUGH = 1000  # clean images; half of so many, at most 256, are held out
QUICK = 1000  # test images that preprocessings are compared on
BETTER = 0.05  # of accuracy, and 1/sqrt(images) for chance, by which another preprocessing must be better than the one assumed
USUAL = {  # mean, std
    "none": ((0.0,), (1.0,)),
    "ImageNet's": (FACTS["imagenet"].mean, FACTS["imagenet"].std),
    "CIFAR-10's": (FACTS["cifar10"].mean, FACTS["cifar10"].std),
    "to [-1,1]": ((0.5,), (0.5,)),
}


def judge_model(model_file: Path, record: RecordSettings, flags: Mapping[str, Any]) -> list[str]:
    """Judge the model whose weights ``model_file`` holds; returns the lines that say the outcome and what to do next.

    The record ``record`` describes is written if there is none, without triggered images. ``flags`` are settings of fmp.py.

    Raises UserError: the file holds no weights of that model, the dataset is not usable, the record is there and of another
    model, or the model classifies its clean images clearly better with another preprocessing than the one assumed.
    """
    record = with_dataset_name(record)
    name = record.save_folder_name or re.sub(r"[^A-Za-z0-9._=-]", "_", model_file.stem).lstrip(".=-") or "model"
    places = {"record_root": record.record_root, "dataset_path": record.dataset_path, "result_file": name}
    settings = load_settings({**flags, **places, "preset": "strong"})
    device = choose_device(settings.device)
    folder, total = _record_of(model_file, replace(record, save_folder_name=name))
    if "ratio" not in flags:
        settings = replace(settings, ratio=max(settings.ratio, min(1.0, math.ceil(100 * ENOUGH / total) / 100)))
    make_deterministic()
    inputs = load_inputs(settings, name, device.device)
    logs.set_up(folder, settings)
    try:
        for line in describe(inputs, settings, device):
            LOGGER.info(line)
        accuracy = _check_preprocessing(inputs, settings)
        verdict = test_for_backdoor(inputs.defender, settings, RunFolder.of(settings, folder).shared, Stages())
    finally:
        logs.close()
    return [f"Accuracy on clean test images: {100 * accuracy:.2f} %.", *in_words(verdict), *_next_step(verdict, settings)]


def weights_in(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file of torch, by itself or as training scripts wrap it. Raises UserError: there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the file that holds the model's weights.")
    content = load_torch_file(path)
    nested = [content[key] for key in NESTED if key in content] if isinstance(content, Mapping) else []
    for state in (content, *nested):
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return state
    raise UserError(f"{path} holds no weights that could be read; save them with torch.save(model.state_dict(), FILE).")


def _record_of(model_file: Path, record: RecordSettings) -> tuple[Path, int]:
    """The folder of the record of this model, written if it is not there, and how many training images its dataset has."""
    folder, known = Path(record.record_root) / str(record.save_folder_name), FACTS.get(record.dataset)
    side = record.image_size or 32
    size = known.size if known else (side, side, 3)
    splits = [open_split(record.dataset_path, record.dataset, train, size) for train in (True, False)]
    classes = (known and known.num_classes) or _classes_of(splits)
    for split in splits:
        check_labels(split, classes, record.dataset)
    state = weights_in(model_file)
    if (folder / ATTACK_FILE).exists():
        there = read_attack_record(folder)
        same = (there.model_name, there.dataset, there.image_size) == (record.model, record.dataset, size)
        same = same and there.state.keys() == state.keys() and all(torch.equal(there.state[key], state[key]) for key in state)
        if not same:
            raise UserError(f"{folder} is the record of another model; choose another --save_folder_name.")
    else:
        load_model(record.model, classes, state)  # which refuses weights of another model
        folder.mkdir(parents=True, exist_ok=True)
        write_attack_record(
            folder,
            name=folder.name,
            model_name=record.model,
            num_classes=classes,
            state=state,
            dataset=record.dataset,
            bd_train=None,
            bd_test=None,
            image_size=size,
        )
    return folder, len(splits[0])


def _classes_of(splits: Sequence[Split]) -> int:
    return max(int(split.labels.max()) for split in splits if len(split.labels)) + 1


def _check_preprocessing(inputs: Inputs, settings: Settings) -> float:
    """Accuracy on a sample of the clean test images. Raises UserError: another preprocessing than the one assumed is better."""
    labels = inputs.test.clean_labels
    rows = even_sample(labels, QUICK)
    images, labels = inputs.test.clean_images[rows], labels[rows]

    def accuracy(facts: DatasetFacts) -> float:
        model = PixelModel(inputs.defender.model.network, facts).on(images.device)
        return float((predict(model, images, labels, settings.batch_size)[0] == labels).double().mean())

    assumed = accuracy(inputs.defender.facts)
    LOGGER.info("Acc %.2f %% on %d clean test images", 100 * assumed, len(labels))
    if settings.mean is None and settings.std is None:
        size = inputs.record.image_size
        others = {name: dataset_facts(inputs.record.dataset, size, *values) for name, values in USUAL.items()}
        found = {name: accuracy(facts) for name, facts in others.items()}
        best = max(found, key=lambda name: found[name])
        if found[best] > assumed + BETTER + len(labels) ** -0.5:
            mean, std = (as_text(tuple(round(x, 4) for x in values)) for values in (others[best].mean, others[best].std))
            raise UserError(
                f"The model classifies {100 * assumed:.1f} % of the clean test images correctly with the dataset's usual "
                f"preprocessing, and {100 * found[best]:.1f} % normalised otherwise ({best}); give --mean {mean} --std {std}, "
                "or your own --mean and --std."
            )
    return assumed


def in_words(verdict: Verdict) -> list[str]:
    """The verdict in a sentence or two."""
    if verdict.too_few:
        return [f"No verdict: {verdict.held_out} held-out clean images of other classes are too few; give more of them."]
    rates, mutual = verdict.flip_rates, verdict.target == ALL_TO_ALL
    rate = float(rates[-1] if mutual else rates[verdict.target])
    towards = "the class after their own" if mutual else f"class {verdict.target}"
    figures = (
        f"an inverted trigger ({verdict.family}) flips {100 * rate:.0f} % of clean images to {towards}, "
        f"{100 * verdict.margin:.0f} points more than the runner-up"
    )
    if verdict.backdoored:
        target = "all-to-all" if mutual else f"target {towards}"
        return [f"Judged backdoored, {target}: {figures}."]
    return [f"Not shown to be backdoored, which does not mean clean: {figures}; {100 * LEAST_MARGIN:.0f} are needed."]


def _next_step(verdict: Verdict, settings: Settings) -> list[str]:
    """The command that repairs the model, where there is something to repair."""
    if not verdict.backdoored:
        return []
    given = {"result_file": settings.result_file, "preset": "strong", "ratio": f"{settings.ratio:g}"}
    usual = Settings()
    given |= {
        key: as_text(getattr(settings, key))
        for key in ("record_root", "dataset_path", "mean", "std", "device", "random_seed", "dtype")
        if getattr(settings, key) not in (getattr(usual, key), "auto")
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return ["To repair it:", f"    python defense/fmp.py {shlex.join(words)}"]
