"""The triggered test images of an attack record (its ``bd_test``), as BackdoorBench v1 or v2 stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # of a nested value it shows the beginning; a few bytes can hold one of endless text
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmp_core.data.images import Size, Split, most_pixels, read_images
from fmp_core.data.pixel_range import Normalisation, pixels_of
from fmp_core.errors import UserError

LONGEST_PATH = 4096  # letters, as on Linux
DIFFERENT_LABELS = 0.05  # share of labels in which re-encoded data may differ from the record; another order differs in most


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


def read_poisoned_set(
    folder: Path, bd_test: Mapping[str, Any] | None, size: Size, scales: Sequence[Normalisation]
) -> PoisonedSet:
    """``bd_test`` of the record in ``folder``, whose images have ``size``; images are located, not yet decoded.

    None, of a model that nobody has a triggered image for, gives an empty set. ``scales``: what images that are held as
    normalised numbers are recognised by. Raises ValueError, or what else reading damaged data can raise.
    """
    if bd_test is None:
        height, width, channels = size
        nothing = torch.zeros(0, dtype=torch.int64)
        return PoisonedSet(torch.zeros(0, channels, height, width, dtype=torch.uint8), nothing, nothing, nothing)
    return _v1_poisoned_set(bd_test, size, scales) if "x" in bd_test else _v2_poisoned_set(folder, bd_test, size, scales)


def _v2_poisoned_set(folder: Path, state: Mapping[str, Any], size: Size, scales: Sequence[Normalisation]) -> PoisonedSet:
    """The state of BB's ``prepro_cls_DatasetBD_v2``; positions whose indicator is 0 are clean and left out."""
    container = state["bd_data_container"]
    indicator, order = integers(state["poison_indicator"]), integers(state["original_index_array"])
    if order and not 0 <= min(order) <= max(order) < len(indicator):
        raise ValueError(f"bd_test has an original index outside 0..{len(indicator) - 1}")
    items = {int(key): value for key, value in container["data_dict"].items()}
    chosen = [i for i in order if indicator[i]]
    if len(set(chosen)) < len(chosen):
        raise ValueError("bd_test names an image twice")
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
        original = [original[i] for i in integers(order) if 0 <= i < len(original)]

    def checked(name: str, values: Any) -> Tensor | None:
        if values is not None and len(values) != len(images):
            raise ValueError(f"bd_test {name} has {len(values)} entries for {len(images)} images")
        return None if values is None else _int64(values)

    return PoisonedSet(images, _int64(state["y"]), checked("original_targets", original), checked("original_index", order))


def _int64(values: Any) -> Tensor:
    return torch.tensor(integers(values), dtype=torch.int64)


def integers(values: Any) -> list[int]:
    """Flat integers. Nested lists can be endless (a few lists that hold each other), so numpy is not asked to unfold them."""
    if isinstance(values, (Tensor, np.ndarray)) and values.ndim != 1:
        raise ValueError(f"indices or labels of shape {tuple(values.shape)}")
    return [integer(value) for value in values]


def integer(value: Any) -> int:
    """A number of a record as an int. Raises ValueError (or TypeError, OverflowError): it is no whole number."""
    if int(value) != value:
        raise ValueError(f"it has {brief(value)} where a size, a class or an index belongs")
    return int(value)


def inside_record(stored: str, saved_below: str | None, folder: Path) -> PurePosixPath:
    """The part of a ``stored`` path that lies inside the record in ``folder``: ``bd_test_dataset/<label>/<i>.png``.

    Raises UserError: it leads out of the record's image folder.
    """
    if not isinstance(stored, str) or len(stored) > LONGEST_PATH:  # each of many images could have it
        raise ValueError(f"an image path of bd_test is {brief(stored)}")
    path, root = PurePosixPath(stored.replace("\\", "/")), folder.resolve()
    base = PurePosixPath(saved_below.replace("\\", "/")) if saved_below else None
    inside = base.name / path.relative_to(base) if base and path.is_relative_to(base) else PurePosixPath(*path.parts[-3:])
    climbs = inside.is_absolute() or ".." in inside.parts or not inside.parts
    images = root / inside.parts[0] if len(inside.parts) > 1 else root  # the image folder, which may be a link
    if climbs or not (root / inside).resolve().is_relative_to(images.resolve()):
        raise UserError(f"The record in {folder} names an image outside its folder ({stored}), and was refused.")
    return inside


def _locate(stored: Sequence[str], saved_below: str | None, folder: Path) -> list[Path]:
    """Files of poisoned images, inside the record folder wherever that lies now.

    BB stores paths relative to the working directory of the attack (``./record/<name>/bd_test_dataset/<label>/<i>.png``), which
    break when the record is moved or renamed. Only the part from the image folder on is used. The image folder may be a link
    (to a larger disk, say); nothing in it may lead out of it, and no stored path may climb.
    """
    found = [folder.resolve() / inside_record(text, saved_below, folder) for text in stored]
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} poisoned test images are missing, first {missing[0]}; copy the whole record."
        )
    return found
