"""A suspicious model without an attack record: put into one, tested on clean images, and judged from these alone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core import PROJECT
from fmp_core.attacks.make_record import image_size_of, with_dataset_name
from fmp_core.attacks.settings import RecordSettings
from fmp_core.data.attack_record import plain_state, read_attack_record
from fmp_core.data.datasets import FACTS, DatasetFacts, Split, check_labels, dataset_facts, open_split
from fmp_core.data.images import Size
from fmp_core.data.names import ATTACK_FILE
from fmp_core.data.write_record import AttackedModel, write_attack_record
from fmp_core.errors import UserError, in_one_line, what_is_there
from fmp_core.fields import as_text
from fmp_core.inputs import Inputs, can_be_trained, describe, load_inputs
from fmp_core.inversion.verdict import in_words
from fmp_core.models.build import PixelModel, load_model
from fmp_core.models.evaluate import even_sample, predict
from fmp_core.report.findings import command
from fmp_core.results.run_folder import RunFolder
from fmp_core.selection.select import test_for_backdoor
from fmp_core.settings import Settings, load_settings
from fmp_core.storage.files import write_json
from fmp_core.storage.torch_file import NotDataError, load_torch_file
from fmp_core.system import logs
from fmp_core.system.cli import Stages, from_here
from fmp_core.system.devices import Device, as_in_a_fresh_process, choose_device
from fmp_core.system.versions import versions

LOGGER = logging.getLogger("fmp_core")
WEIGHT_KEYS = (  # where training scripts keep the weights
    "state_dict", "model_state_dict", "model", "net", "network", "weights", "state_dict_ema", "model_ema",
)  # fmt: skip
ENOUGH_IMAGES = 1000  # clean images; half of so many, at most 256, are held out
SAMPLE_IMAGES = 1000  # test images that preprocessings are compared on
VERDICT_FILE = "verdict.json"  # in the record's folder
LOW_ACCURACY = 0.5  # accuracy below which a verdict may be about how the model was given its images
UNLIKELY = 0.001  # probability of so many correct answers by chance below which accuracy is not chance
CLEARLY_BETTER = 0.05  # of accuracy, plus 1/sqrt(images) for chance: another preprocessing is named from here on
USUAL_NORMALISATIONS = {  # mean, std
    "none": ((0.0,), (1.0,)),
    "ImageNet's": (FACTS["imagenet"].mean, FACTS["imagenet"].std),
    "CIFAR-10's": (FACTS["cifar10"].mean, FACTS["cifar10"].std),
    "to [-1,1]": ((0.5,), (0.5,)),
}


@as_in_a_fresh_process()
def judge_model(model_file: Path, record: RecordSettings, flags: Mapping[str, Any]) -> list[str]:
    """Judge the model whose weights ``model_file`` holds; returns the lines that say the outcome and what to do next.

    The record ``record`` describes is written if there is none, without triggered images. ``flags`` are settings of fmp.py.
    The outcome is written to ``verdict.json`` in the record's folder, too.

    Raises UserError: the file holds no weights of that model, the dataset is not usable, the record is there and of another
    model, or the model classifies its clean images clearly better with another preprocessing than the one assumed.
    """
    versions()  # as they are now
    record = with_dataset_name(record)
    name = record.save_folder_name or re.sub(r"[^A-Za-z0-9._=-]", "_", model_file.stem).lstrip(".=-") or "model"
    places = {"record_root": record.record_root, "dataset_path": record.dataset_path, "result_file": name}
    settings = load_settings({**flags, **places, "preset": "strong"})
    device = choose_device(settings.device)
    folder, total, is_new = _write_or_compare_record(model_file, replace(record, save_folder_name=name))
    if "ratio" not in flags:
        settings = replace(settings, ratio=max(settings.ratio, min(1.0, math.ceil(100 * ENOUGH_IMAGES / total) / 100)))
    try:
        with _removed_if_refused(folder if is_new else None):
            inputs = load_inputs(replace(settings, epochs=0), name, device.device)  # a verdict trains nothing
            logs.set_up(folder, settings)
            for line in describe(inputs, settings, device):
                LOGGER.info(line)
            accuracy = _check_preprocessing(inputs, settings)
        stages = Stages()
        verdict = test_for_backdoor(inputs.defender, settings, RunFolder.of(settings, folder).shared, stages)
    finally:
        logs.close()
    repair = _repair_command(settings, can_be_trained(inputs)) if verdict.backdoored else None
    found = {"model_file": str(model_file), "accuracy": accuracy, "verdict": verdict.as_dict(), "repair": repair}
    content = {**found, **_conditions(inputs, settings, device, stages)}
    write_json(folder / VERDICT_FILE, content)
    lines = [f"Accuracy on clean test images: {100 * accuracy:.2f} %."]
    if accuracy < LOW_ACCURACY:
        lines.append("That is low: what follows may be about how the model was given its images, not about a backdoor.")
    lines += [in_words(verdict.as_dict()), f"For programs: {folder / VERDICT_FILE}"]
    return [*lines, "To repair it:", f"    {repair}"] if repair else lines


@contextlib.contextmanager
def _removed_if_refused(folder: Path | None) -> Iterator[None]:
    """Remove the ``folder`` that was just made if a UserError is raised."""
    try:
        yield
    except UserError:
        if folder:
            shutil.rmtree(folder)
        raise


def weights_in(path: Path) -> OrderedDict[str, Tensor]:
    """The state dict in a file of torch, by itself or as training scripts wrap it. Raises UserError: there is none."""
    if not path.is_file():
        raise UserError(f"{path} {what_is_there(path)}; name the file that holds the model's weights.")
    try:
        content = load_torch_file(path)
    except NotDataError as error:
        advice = "Of a model of yours that was saved whole, torch.save model.state_dict() instead."
        raise UserError(f"{error} {advice}") from None
    nested = _below_weight_keys(content)
    for state in (content, *nested, *(inner for part in nested for inner in _below_weight_keys(part))):
        if isinstance(state, Mapping) and state:
            with contextlib.suppress(ValueError):
                return plain_state(state)
    raise UserError(f"{path} holds no weights that could be read; save them with torch.save(model.state_dict(), FILE).")


def _below_weight_keys(content: Any) -> list[Any]:
    return [content[key] for key in WEIGHT_KEYS if key in content] if isinstance(content, Mapping) else []


def _write_or_compare_record(model_file: Path, record: RecordSettings) -> tuple[Path, int, bool]:
    """The folder of the record of this model, how many training images its dataset has, and whether the folder is new."""
    folder, size = Path(record.record_root) / str(record.save_folder_name), image_size_of(record)
    splits = [open_split(record.dataset_path, record.dataset, train, size) for train in (True, False)]
    classes = dataset_facts(record.dataset, size).num_classes or _classes_of(splits)
    for split in splits:
        check_labels(split, classes, record.dataset)
    if classes < 2:
        raise UserError(f"{record.dataset} has images of one class only; a verdict needs two.")
    state = weights_in(model_file)
    _check_fit(model_file, record, state, classes, size)
    if (folder / ATTACK_FILE).exists():
        there = read_attack_record(folder)
        about, now = (there.model_name, there.dataset, there.image_size), (record.model, record.dataset, size)
        same = there.state.keys() == state.keys() and all(torch.equal(there.state[key], state[key]) for key in state)
        if about != now or not same:
            other = "of another model" if not same else f"of {about[0]} on {about[1]} with images {about[2]}"
            raise UserError(f"{folder} is a record {other}; remove it, or choose another --save_folder_name.")
        return folder, len(splits[0]), False
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    write_attack_record(
        folder,
        name=folder.name,
        model=AttackedModel(record.model, classes, state),
        dataset=record.dataset,
        bd_train=None,
        bd_test=None,
        image_size=size,
    )
    return folder, len(splits[0]), is_new


def _check_fit(model_file: Path, record: RecordSettings, state: Mapping[str, Tensor], classes: int, size: Size) -> None:
    """Raises UserError, before anything is written: the weights do not fit the model and the dataset, or images do not."""
    try:
        network = load_model(record.model, classes, state).eval()
    except UserError as error:
        raise UserError(
            f"{model_file} does not fit --model {record.model} and the {classes} classes of {record.dataset} "
            f"({str(error).rstrip('.')}); check --model and --dataset."
        ) from None
    try:
        with torch.inference_mode():
            network(torch.zeros(1, size[2], *size[:2]))
    except (RuntimeError, ValueError) as error:
        shown = "x".join(map(str, size))
        raise UserError(
            f"{record.model} cannot take images of {shown} ({in_one_line(error)}); check --image_size, --model and --dataset."
        ) from None


def _classes_of(splits: Sequence[Split]) -> int:
    return max(int(split.labels.max()) for split in splits if len(split.labels)) + 1


def _check_preprocessing(inputs: Inputs, settings: Settings) -> float:
    """Accuracy on a sample of the clean test images. Raises UserError: another preprocessing than the one assumed is better, or
    accuracy is chance. Both are judged by the mean accuracy of the classes, which a constant answer does not raise."""
    labels = inputs.test.clean_labels
    rows = even_sample(labels, SAMPLE_IMAGES)
    images, labels = inputs.test.clean_images[rows], labels[rows]
    classes = labels.unique()
    sizes = labels.bincount()[classes].double()

    def hits(facts: DatasetFacts) -> Tensor:
        model = PixelModel(inputs.defender.model.network, facts).on(images.device)
        return predict(model, images, labels, settings.batch_size)[0] == labels

    def over_classes(right: Tensor) -> float:
        return float(torch.stack([right[labels == label].double().mean() for label in classes]).mean())

    own = hits(inputs.defender.facts)
    accuracy, assumed = float(own.double().mean()), over_classes(own)
    count = int(len(classes) ** 2 / sizes.reciprocal().sum() + 1e-6)  # of classes of one size, so many would tell as much
    LOGGER.info("Acc %.2f %% on %d clean test images", 100 * accuracy, len(labels))
    size = inputs.record.image_size
    others = {name: dataset_facts(inputs.record.dataset, size, *values) for name, values in USUAL_NORMALISATIONS.items()}
    found = {name: over_classes(hits(facts)) for name, facts in others.items()}
    best = max(found, key=lambda name: found[name])
    if found[best] > assumed + CLEARLY_BETTER + count**-0.5:
        mean, std = (as_text(tuple(round(x, 4) for x in values)) for values in (others[best].mean, others[best].std))
        used = "the dataset's usual preprocessing" if settings.mean is None else "the --mean and --std given"
        raise UserError(
            f"The model classifies {100 * assumed:.1f} % of the clean test images (mean over classes) correctly with {used}, "
            f"and {100 * found[best]:.1f} % normalised otherwise ({best}); give --mean {mean} --std {std}, or the model's own."
        )
    chance = 1 / max(2, len(classes))
    right = round(assumed * count)
    by_chance = sum(math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(right, count + 1))
    if by_chance > UNLIKELY and assumed < (1 + chance) / 2:  # few images show little: half the way is enough then
        side = inputs.record.image_size[0]
        raise UserError(
            f"The model classifies {100 * assumed:.1f} % of {len(labels)} clean test images (mean over classes) correctly, "
            "no more than chance, so a verdict would mean nothing: check that the class folders, in alphabetical order, are "
            f"the model's classes, --image_size (here {side}), --mean and --std, and --dataset."
        )
    return accuracy


def _conditions(inputs: Inputs, settings: Settings, device: Device, stages: Stages) -> dict[str, Any]:
    """What the model was judged with; the keys, and what they say, are those of ``metrics.json``."""
    record = inputs.record
    return {
        "record": record.folder.name,
        "dataset": record.dataset,
        "model": record.model_name,
        "attack_result": record.digest,
        "clean_images": len(inputs.subset),
        "seconds": stages.seconds,
        "reused": stages.reused,
        "seed": settings.random_seed,
        "device": device.full_name,
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
    }


def _repair_command(settings: Settings, trainable: bool = True) -> str:
    """The command that repairs the model; by pruning alone if it is not ``trainable`` on such images."""
    settings = settings if trainable else replace(settings, epochs=0)
    names = (
        "preset", "result_file", "record_root", "dataset_path", "ratio", "mean", "std",
        "device", "random_seed", "dtype", "epochs",
    )  # fmt: skip
    script = from_here(PROJECT / "defense" / "fmp.py")
    return command({name: getattr(settings, name) for name in names}).replace("defense/fmp.py", script, 1)
