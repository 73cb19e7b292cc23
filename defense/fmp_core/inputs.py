"""What one run reads: the attack record, its model, the clean subset and both test sets, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fmp_core.data.attack_record import AttackRecord, read_attack_record
from fmp_core.data.clean_subset import choose_subset, in_mixed_order
from fmp_core.data.datasets import DatasetFacts, Split, check_labels, dataset_facts, known_name, open_split
from fmp_core.errors import UserError, in_one_line
from fmp_core.models.build import PixelModel, load_model, outputs_in_training
from fmp_core.models.evaluate import TestData, even_sample, to_unit
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.settings import Settings, Stage, changed, names
from fmp_core.system.devices import Device, is_out_of_memory

TAC_PAIRS = 512  # pairs of images that the trigger activation change is averaged over


@dataclass(frozen=True)
class DefenderInputs:
    """What a defender has: the suspicious model and a few clean images. No poisoned image is among them.

    ``model`` takes pixels in [0,1], ``layers`` are its convolutions in execution order. ``images`` (uint8 ``[M, C, H, W]``) and
    ``labels`` (int64 ``[M]``) are the clean subset. All are on the device.
    """

    model: PixelModel
    layers: list[ConvLayer]
    images: Tensor
    labels: Tensor
    num_classes: int
    facts: DatasetFacts


@dataclass(frozen=True)
class Inputs:
    """All that a run reads. Only evaluation sees ``test``; ``subset`` are positions in the clean training set; ``sample``
    is the ``--test_images`` of a run that left images out."""

    record: AttackRecord
    subset: list[int]
    defender: DefenderInputs
    test: TestData
    sample: int | None = None


def load_inputs(settings: Settings, result_file: str, device: torch.device) -> Inputs:
    """Read and check everything; nothing is written, so bad input leaves no trace.

    Raises UserError if the record, the dataset, the index file or a flag that contradicts them is not usable.
    """
    record = read_attack_record(record_folder(settings.record_root, result_file), settings.mean, settings.std)
    _check_flags(settings, record)
    facts = preprocessing(record, settings.mean, settings.std)
    train_set, test_set = (
        open_split(settings.dataset_path, record.dataset, train, record.image_size) for train in (True, False)
    )
    for split in (train_set, test_set):
        check_labels(split, record.num_classes, record.dataset)
    known = int(train_set.labels.max()) + 1
    if known < record.num_classes and known_name(record.dataset) is None and not len(record.bd_test):
        raise UserError(
            f"{record.dataset} has folders of {known} classes, but the record's model has {record.num_classes}, and without "
            "the labels of triggered images nothing says which are missing; complete the folders, or check --dataset_path."
        )
    subset = choose_subset(len(train_set), settings.ratio, settings.random_seed, settings.index)
    if settings.index is not None:
        subset = in_mixed_order(subset, train_set.labels[subset].tolist(), settings.random_seed)
    if settings.epochs and len(subset) < 2:
        raise UserError("Fine-tuning needs at least 2 clean images, not 1; raise --ratio or add to --index.")
    test = read_test_data(record, test_set, device, settings.test_images)
    sample = settings.test_images if len(test) < len(test_set) + len(record.bd_test) else None
    network = load_model(record.model_name, record.num_classes, record.state)
    model = PixelModel(network, facts).on(device)
    images, labels = train_set.read(subset).to(device), train_set.labels[subset].to(device)
    try:
        layers = trace_conv_layers(network, to_unit(images[:1]))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{record.model_name} cannot take the record's {record.image_size} images ({in_one_line(error)}); "
            "check its img_size."
        ) from None
    if settings.epochs:
        _check_trainable(network, record)
    return Inputs(record, subset, DefenderInputs(model, layers, images, labels, record.num_classes, facts), test, sample)


def _check_trainable(network: nn.Module, record: AttackRecord) -> None:
    """Raises UserError: images are too small for a part that is used in training only (the auxiliary head of inception_v3)."""
    try:
        outputs_in_training(network, record.image_size)
    except NotImplementedError:  # an operation that the meta device lacks
        pass
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{record.model_name} cannot be trained on the record's {record.image_size} images "
            f"({in_one_line(error)}); give --epochs 0 for pruning alone."
        ) from None


def can_be_trained(inputs: Inputs) -> bool:
    """Whether images are large enough for every part of the model that is used in training."""
    try:
        _check_trainable(inputs.defender.model.network, inputs.record)
    except UserError:
        return False
    return True


def record_folder(record_root: str, result_file: str) -> Path:
    """The folder of the record ``--result_file``, resolved where that ends in ``.`` or ``..``, which name no record.

    Raises UserError if it is the path of a record, as shells complete it, and not its name.
    """
    root, given = Path(record_root), Path(result_file)
    if not (root / given).exists() and given.is_dir() and given.is_relative_to(root):
        raise UserError(
            f"--result_file names a record below --record_root {root}: give --result_file {given.relative_to(root)}."
        )
    return root / given if (root / given).name not in ("", "..") else (root / given).resolve()


def read_test_data(record: AttackRecord, test_set: Split, device: torch.device, test_images: int | None = None) -> TestData:
    """Both test sets on ``device``; of each an even sample of ``test_images`` images, if that is given.

    Raises UserError if an image cannot be read, or the record does not determine the true labels.
    """
    attacked = record.bd_test
    poisoned = attacked.pixels(record.image_size)  # first: their size is a stranger's claim
    originals = attacked.true_labels(test_set)
    clean_rows, poisoned_rows = (even_sample(x, test_images or len(x)) for x in (test_set.labels, originals))
    counterparts = None
    if attacked.indices is not None:
        places = torch.full((len(test_set),), -1)
        places[clean_rows] = torch.arange(len(clean_rows))
        counterparts = places[attacked.indices[poisoned_rows]].to(device)
    return TestData(
        test_set.read(clean_rows.tolist()).to(device),
        test_set.labels[clean_rows].to(device),
        poisoned[poisoned_rows].to(device),
        attacked.targets[poisoned_rows].to(device),
        originals[poisoned_rows].to(device),
        counterparts,
    )


def paired_images(test: TestData, count: int = TAC_PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``count`` pairs, evenly over the poisoned test set: clean images, the poisoned ones made from them (uint8
    ``[n, C, H, W]``), and their true classes (int64 ``[n]``). Raises UserError if it is not known which belong together.
    """
    if not len(test.targets):
        raise UserError("The record holds no triggered test image.")
    if test.counterparts is None:
        raise UserError("The record does not say which clean test image each poisoned one was made from.")
    labels = test.clean_labels[test.counterparts.clamp(min=0)]
    known = ((test.counterparts >= 0) & (labels == test.originals)).nonzero().flatten()  # labels may differ in re-encoded data
    if not len(known):
        raise UserError("No poisoned test image has its clean counterpart among the images tested; raise --test_images.")
    rows = known[torch.linspace(0, len(known) - 1, min(count, len(known))).round().long().to(known.device)]
    return test.clean_images[test.counterparts[rows]], test.poisoned_images[rows], test.originals[rows]


def preprocessing(
    record: AttackRecord, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> DatasetFacts:
    """The facts of the record's dataset, with the normalisation that ``--mean`` and ``--std`` give."""
    channels = record.image_size[2]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise UserError(f"--{name} has {len(values)} numbers, but the record's images have {channels} channel(s).")
    return dataset_facts(record.dataset, record.image_size, mean, std)


def _check_flags(settings: Settings, record: AttackRecord) -> None:
    """A setting that contradicts the record is an error, not a silent override."""
    stored = {"dataset": record.dataset, "model": record.model_name, "num_classes": record.num_classes}
    for key, value in stored.items():
        given = getattr(settings, key)
        if given not in (None, value):
            raise UserError(
                f"{key} is set to {given}, but the record in {record.folder} has {value}; leave --{key} (or {key} in the YAML "
                "file) out."
            )


def describe(inputs: Inputs, settings: Settings, device: Device) -> list[str]:
    """About ten lines for the terminal: what the run works on, where, and how."""
    record, defender, test = inputs.record, inputs.defender, inputs.test
    height, width, channels = record.image_size
    tested = f"{len(test.clean_labels)} clean and {len(test.targets) or 'no'} poisoned"
    if inputs.sample:
        tested += f" (--test_images {inputs.sample}: an even sample)"
    maps = sum(layer.channels for layer in defender.layers)
    named = {"preset", "result_file", "record_root", "dataset_path", *names(Stage.NO_EFFECT, decides=False)}
    differing = {key: value for key, value in changed(vars(settings)).items() if key not in named}
    return [
        f"record    {record.folder}",
        f"model     {record.model_name}, {maps} feature maps in {len(defender.layers)} layers",
        f"dataset   {record.dataset}, {record.num_classes} classes, {height}x{width}x{channels}",
        f"pixels    {_normalisation(defender.facts)}",
        f"clean     {len(inputs.subset)} training images" + (f" (--index {settings.index})" if settings.index else ""),
        f"test      {tested} images",
        f"device    {device.name}",
        f"preset    {settings.preset}",
        f"settings  {', '.join(f'{key} {value}' for key, value in differing.items()) or 'all as in the preset'}",
    ]


def _normalisation(facts: DatasetFacts) -> str:
    """How the model's preprocessing changes pixels in [0,1]."""
    if set(facts.mean) == {0.0} and set(facts.std) == {1.0}:
        return "in [0,1], not normalised (--mean and --std would)"
    mean, std = (",".join(f"{value:g}" for value in values) for values in (facts.mean, facts.std))
    return f"in [0,1], normalised with mean {mean} and standard deviation {std}"
