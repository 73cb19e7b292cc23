"""Reading attack records, as data: nothing in them is executed.

Formats: BB ``utils/save_load_attack.py`` and ``utils/bd_dataset_v2.py``; records of BB v1 hold plain ``x``/``y`` dicts.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # of a nested value it shows the beginning; a few bytes can hold one of endless text
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmp_core.data.datasets import DATASET_NAME, Split, dataset_facts
from fmp_core.data.folders import visible
from fmp_core.data.images import Size, most_pixels, read_images
from fmp_core.data.pixel_range import Normalisation, pixels_of
from fmp_core.errors import UserError, did_you_mean
from fmp_core.storage.placeholders import Opaque
from fmp_core.storage.torch_file import load_torch_file

ATTACK_FILE = "attack_result.pt"
MOST_CLASSES = 1_000_000
DIFFERENT_LABELS = 0.05  # share of labels in which re-encoded data may differ from the record; another order differs in most
DEPTH = 4  # folders between a record root and its records
ATTACK_KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")
READ_KEYS = tuple(key for key in ATTACK_KEYS if key not in ("data_path", "bd_train"))  # BB alone reads these


@dataclass(frozen=True)
class PoisonedSet:
    """Triggered test images.

    ``images`` are files, or uint8 ``[N, C, H, W]`` where the record held them in memory. ``targets`` are the attacker's
    labels and ``original`` the true ones (both int64 ``[N]``); ``original`` is None where a v1 record does not say and
    ``indices`` (positions in the clean test set, int64 ``[N]``) has to answer. ``total``: how many images that set has, where
    the record says so.
    """

    images: list[Path] | Tensor
    targets: Tensor
    original: Tensor | None
    indices: Tensor | None
    total: int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def pixels(self, size: Size) -> Tensor:
        """uint8 ``[N, C, H, W]``. Raises UserError if a file cannot be decoded."""
        if isinstance(self.images, Tensor):
            return self.images
        return read_images(self.images, size, most_pixels(len(self.images), size))

    def true_labels(self, clean_test: Split) -> Tensor:
        """The true labels, int64 ``[N]``, compared with those of the clean test set where the record names its images.

        Raises UserError if the record does not determine them, or if they are not those of ``clean_test`` (another order,
        other data).
        """
        if self.total not in (None, len(clean_test)):  # BB refuses it, too: from the first image amiss all others are shifted
            raise UserError(
                f"The record was made of {self.total} clean test images, but the test set has {len(clean_test)}; check "
                "--dataset_path, and that no file was added or lost."
            )
        if self.indices is None:
            if self.original is None:
                raise UserError(
                    "The record's bd_test holds neither true labels nor positions of the poisoned images in the test set, so "
                    "RA is undefined; make the record again."
                )
            return self.original
        if not ((self.indices >= 0) & (self.indices < len(clean_test))).all():
            raise UserError(
                f"The record names poisoned test images {int(self.indices.min())} to {int(self.indices.max())}, but the clean "
                f"test set has images 0..{len(clean_test) - 1}; check --dataset_path."
            )
        labels = clean_test.labels[self.indices]
        if self.original is None:
            return labels
        different = int((labels != self.original).sum())
        if different > DIFFERENT_LABELS * len(self):
            raise UserError(
                "The clean test set is not the one that the record was made of, or in another order: of the true labels that "
                f"the record stores of its {len(self)} poisoned test images, only {len(self) - different} are those of the "
                "clean test images at these positions; check --dataset_path."
            )
        return self.original


@dataclass(frozen=True)
class AttackRecord:
    """An attack record: the suspicious model and what is needed to judge it.

    ``state`` keys lack the parts ``module`` and ``_orig_mod``, with which DataParallel and ``torch.compile`` wrap modules; the
    dict may have torch's ``_metadata``.
    """

    folder: Path
    model_name: str
    num_classes: int
    state: OrderedDict[str, Tensor]
    dataset: str
    image_size: Size
    bd_test: PoisonedSet


def find_records(root: str | Path) -> list[str]:
    """Names of the folders below ``root`` that hold an attack record, at most DEPTH levels deep; links are followed."""
    root, found, seen = Path(root), [], set()
    for folder, inside, files in os.walk(root, followlinks=True):
        place, real = Path(folder).relative_to(root), os.path.realpath(folder)
        is_record = ATTACK_FILE in files and bool(place.parts)
        if is_record:
            found.append(place.as_posix())
        if is_record or real in seen or len(place.parts) >= DEPTH:
            inside.clear()  # a record holds no records, but thousands of images
        inside[:] = [name for name in inside if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def read_attack_record(
    folder: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> AttackRecord:
    """Read ``folder/attack_result.pt`` as BB v1 or v2 wrote it. Poisoned images are located, not yet decoded.

    Images that are held in the record as normalised numbers are recognised by ``mean`` and ``std`` (``--mean`` and ``--std``),
    and by the dataset's.

    Raises UserError, naming the file and the part, if anything is missing, damaged, refused or impossible.
    """
    folder = Path(folder)
    path = folder / ATTACK_FILE
    if folder.is_file():
        raise UserError(f"{folder} is a file, but a record is a folder; docs/records.md says how to make one of a model.")
    if not folder.is_dir():
        meant = did_you_mean(folder.name, [path.name for path in visible(folder.parent)])
        raise UserError(f"Record folder {folder} does not exist{meant}; check --result_file and --record_root.")
    if not path.is_file():
        raise UserError(f"Record folder {folder} holds no {ATTACK_FILE}; the attack may not have ended, or this is no record.")
    content = load_torch_file(path)
    missing = [key for key in READ_KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        bare = isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values())
        what = "holds weights alone; docs/records.md says how to make a record of a model" if bare else "check --result_file"
        raise UserError(f"{path} is not an attack record ({what}): it lacks {', '.join(missing)}.")
    try:
        return _attack_record(folder, content, mean, std)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is not as BackdoorBench writes it ({type(error).__name__}: {error}).") from None


def _refuse_placeholders(content: Mapping[str, Any]) -> None:
    """An object of a class that this program does not know may stand where nobody looks, but not where data is needed."""
    needed = {key: content[key] for key in READ_KEYS}
    if isinstance(needed["bd_test"], Mapping):
        parts = ("bd_data_container", "poison_indicator", "original_index_array")
        needed |= {f"bd_test {key}": needed["bd_test"].get(key) for key in parts}
    for key, value in needed.items():
        if isinstance(value, Opaque):
            raise ValueError(f"{key} is a {value.name}, which holds no data that could be read")


def _attack_record(
    folder: Path, content: Mapping[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> AttackRecord:
    _refuse_placeholders(content)
    dataset, model_name = content["clean_data"], content["model_name"]
    if not (isinstance(dataset, str) and re.fullmatch(DATASET_NAME, dataset)):
        raise ValueError(f"clean_data is {brief(dataset)}, which names no dataset")
    if not isinstance(model_name, str):
        raise ValueError(f"model_name is {brief(model_name)}")
    num_classes = _integer(content["num_classes"])
    height, width, channels = _integers(content["img_size"])
    if not 2 <= num_classes <= MOST_CLASSES or not (0 < height <= 4096 and 0 < width <= 4096 and channels in (1, 3)):
        raise ValueError(f"num_classes is {brief(num_classes)} and img_size {brief(content['img_size'])}")
    size = (height, width, channels)
    bd_test = content["bd_test"]
    if not isinstance(bd_test, Mapping):
        raise ValueError(f"bd_test is a {type(bd_test).__name__}")
    known = [dataset_facts(dataset, size, mean, std), dataset_facts(dataset, size)]
    scales = [(facts.mean, facts.std) for facts in known]
    poisoned = _v1_poisoned_set(bd_test, size, scales) if "x" in bd_test else _poisoned_set(folder, bd_test, size, scales)
    for name, labels in (("attack", poisoned.targets), ("original", poisoned.original)):
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"an {name} label of bd_test is outside 0..{num_classes - 1}")
    if not len(poisoned):
        raise ValueError("bd_test holds no poisoned image")
    return AttackRecord(folder, model_name, num_classes, _state(content["model"]), dataset, size, poisoned)


def _state(model: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    state: OrderedDict[str, Tensor] = OrderedDict()
    for stored, value in model.items():
        key = _unwrapped(str(stored))
        if not isinstance(value, Tensor):
            raise ValueError(f"model[{key!r}] is a {type(value).__name__} that holds no numbers")
        if key in state:
            raise ValueError(f"model has two weights that are called {key} without 'module' and '_orig_mod'")
        state[key] = value
    saved = getattr(model, "_metadata", None)
    if isinstance(saved, Mapping):
        state._metadata = {_unwrapped(str(key)): value for key, value in saved.items()}  # type: ignore[attr-defined]
    return state


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _poisoned_set(folder: Path, state: Mapping[str, Any], size: Size, scales: Sequence[Normalisation]) -> PoisonedSet:
    """The state of BB's ``prepro_cls_DatasetBD_v2``; positions whose indicator is 0 are clean and left out."""
    container = state["bd_data_container"]
    indicator, order = _integers(state["poison_indicator"]), _integers(state["original_index_array"])
    if order and not 0 <= min(order) <= max(order) < len(indicator):
        raise ValueError(f"bd_test has an original index outside 0..{len(indicator) - 1}")
    items = {int(key): value for key, value in container["data_dict"].items()}
    chosen = [i for i in order if indicator[i]]
    absent = next((i for i in chosen if i not in items), None)
    if absent is not None:
        raise ValueError(f"bd_test has no entry for poisoned image {absent}")
    on_disk = all(isinstance(items[i], Mapping) for i in chosen)
    images: list[Path] | Tensor
    if on_disk:
        labels = [items[i]["other_info"] for i in chosen]
        images = _locate([items[i]["path"] for i in chosen], container.get("save_folder_path"), folder)
    else:
        labels = [items[i][1:] for i in chosen]
        images = pixels_of([items[i][0] for i in chosen], size, scales)
    return PoisonedSet(images, _int64([x[0] for x in labels]), _int64([x[1] for x in labels]), _int64(chosen), len(indicator))


def _v1_poisoned_set(state: Mapping[str, Any], size: Size, scales: Sequence[Normalisation]) -> PoisonedSet:
    if len(state["x"]) != len(state["y"]) or not len(state["y"]):
        raise ValueError(f"bd_test has {len(state['x'])} images and {len(state['y'])} labels")
    images = pixels_of(state["x"], size, scales)

    original, order = state.get("original_targets"), state.get("original_index")
    if original is not None and order is not None and len(original) > len(images) == len(order):  # early v1: of all test images
        original = [original[i] for i in _integers(order) if 0 <= i < len(original)]

    def checked(name: str, values: Any) -> Tensor | None:
        if values is not None and len(values) != len(images):
            raise ValueError(f"bd_test {name} has {len(values)} entries for {len(images)} images")
        return None if values is None else _int64(values)

    return PoisonedSet(images, _int64(state["y"]), checked("original_targets", original), checked("original_index", order))


def _int64(values: Any) -> Tensor:
    return torch.tensor(_integers(values), dtype=torch.int64)


def _integers(values: Any) -> list[int]:
    """Flat integers. Nested lists can be endless (a few lists that hold each other), so numpy is not asked to unfold them."""
    if isinstance(values, (Tensor, np.ndarray)) and values.ndim != 1:
        raise ValueError(f"indices or labels of shape {tuple(values.shape)}")
    return [_integer(value) for value in values]


def _integer(value: Any) -> int:
    if int(value) != value:
        raise ValueError(f"it has {brief(value)} where a size, a class or an index belongs")
    return int(value)


def _locate(stored: Sequence[str], saved_below: str | None, folder: Path) -> list[Path]:
    """Files of poisoned images, inside the record folder wherever that lies now.

    BB stores paths relative to the working directory of the attack (``./record/<name>/bd_test_dataset/<label>/<i>.png``), which
    break when the record is moved or renamed. Only the part from the image folder on is used. The image folder may be a link
    (to a larger disk, say); nothing in it may lead out of it, and no stored path may climb.
    """
    root = folder.resolve()
    base = PurePosixPath(saved_below.replace("\\", "/")) if saved_below else None
    found = []
    for text in stored:
        path = PurePosixPath(text.replace("\\", "/"))
        inside = base.name / path.relative_to(base) if base and path.is_relative_to(base) else PurePosixPath(*path.parts[-3:])
        file, image_folder = root / inside, root / inside.parts[0]
        climbs = inside.is_absolute() or ".." in inside.parts
        if climbs or not file.resolve().is_relative_to(image_folder.resolve()):
            raise UserError(f"The record in {folder} names an image outside its folder ({text}), and was refused.")
        found.append(file)
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} poisoned test images are missing, first {missing[0]}; copy the whole record."
        )
    return found
