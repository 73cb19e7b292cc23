"""Datasets by name: what BackdoorBench knows of them, and their images as uint8 tensors (read from disk, never downloaded)."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import MNIST

from fmp_core.data.folders import LayoutError, celeba, gtsrb, image_folder, tiny_imagenet, visible
from fmp_core.data.images import Size, Split, resized
from fmp_core.errors import UserError
from fmp_core.storage.placeholders import RefusedError
from fmp_core.storage.unpickler import read_pickle

__all__ = ["DATASET_NAME", "FACTS", "DatasetFacts", "Split", "check_labels", "dataset_facts", "known_name", "open_split"]


@dataclass(frozen=True)
class DatasetFacts:
    """What BB knows of a dataset (``utils/aggregate_block/dataset_and_transform_generate.py``).

    ``num_classes`` and ``size`` are BB's defaults; a record may hold others. ``mean`` and ``std`` have one number a channel.
    """

    num_classes: int | None
    size: Size
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    flip: bool = False  # BB flips training images of cifar10 only
    crop_padding: int = 4  # of the training transform's random crop


FACTS = {
    "cifar10": DatasetFacts(10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), flip=True),
    "cifar100": DatasetFacts(100, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": DatasetFacts(43, (32, 32, 3)),
    "tiny": DatasetFacts(200, (64, 64, 3), (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "mnist": DatasetFacts(10, (28, 28, 1), (0.5,), (0.5,)),
    "celeba": DatasetFacts(8, (64, 64, 3)),
    "imagenet": DatasetFacts(1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
FOLDER_CROP_PADDING = 2  # for image folders BB does not know; 4 would cut a corner trigger out of half the images
ALIASES = {"tinyimagenet": "tiny", "tinyimagenet200": "tiny", "imagenet1k": "imagenet", "ilsvrc2012": "imagenet"}
DATASET_NAME = r"\w[\w. -]*"  # what a record may call its dataset, which is also the name of a folder


def known_name(name: str) -> str | None:
    """BB's name of the dataset that ``name`` means (``CIFAR-10``, ``tiny-imagenet-200``), or None."""
    plain = re.sub(r"[\W_]", "", name.lower())
    plain = ALIASES.get(plain, plain)
    return plain if plain in FACTS else None


def dataset_facts(
    name: str, size: Size, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> DatasetFacts:
    """BB's facts of ``name`` for images of ``size``, with ``mean`` and ``std`` in place of the dataset's if they are given.

    A dataset BB does not know is an image folder with pixels in [0,1] as they are.
    """

    def per_channel(values: Sequence[float]) -> tuple[float, ...]:
        """One number a channel; of a grey image the mean over colours, of a coloured one the grey number."""
        return tuple(values) if len(values) == size[2] else (float(np.mean(values)),) * size[2]

    unknown = DatasetFacts(None, size, (0.0,), (1.0,), crop_padding=FOLDER_CROP_PADDING)
    facts = FACTS.get(known_name(name) or "", unknown)
    return replace(facts, mean=per_channel(mean or facts.mean), std=per_channel(std or facts.std))


# What parsing a damaged file can raise, in our code or in torchvision's.
_BAD_CONTENT = (csv.Error, LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError)


def open_split(root: str | Path, name: str, train: bool, size: Size) -> Split:
    """Open one split of dataset ``name`` below ``root``; images of folder datasets are decoded only when read.

    The folder is ``root/name``, or one whose name means the same dataset (``data/GTSRB`` for ``gtsrb``).

    Raises:
        UserError: the folder or a file of it is missing, damaged or laid out in no way that is known; says what is wanted.
    """
    folder, known = dataset_folder(Path(root), name), known_name(name)
    about = f"Dataset {name} in {folder}"
    try:
        try:
            return _OPENERS.get(known or "", image_folder)(folder, train, size)
        except LayoutError:
            if known not in _OPENERS or not {"train", "Train"} & {path.name for path in visible(folder)}:
                raise
            return image_folder(folder, train, size)  # known datasets are also kept as folders of images
    except LayoutError as error:
        raise UserError(f"{about} {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"{about} is incomplete: {error.filename or error} is missing; unpack the dataset again.") from None
    except RefusedError as error:
        raise UserError(f"{about} was refused: it asks for {error}; unpack the dataset again.") from None
    except (OSError, EOFError, *_BAD_CONTENT) as error:
        raise UserError(f"{about} cannot be read ({error}); unpack the dataset again.") from None


def check_labels(split: Split, num_classes: int, name: str) -> None:
    """Raises UserError unless the split of dataset ``name`` has images, and labels of ``num_classes`` classes."""
    labels = split.labels.tolist()
    if not labels or not 0 <= min(labels) <= max(labels) < num_classes:
        raise UserError(
            f"Dataset {name} must have images labelled 0..{num_classes - 1}, but has {len(labels)} images"
            f"{f' labelled {min(labels)}..{max(labels)}' if labels else ''}; check --dataset_path."
        )


def dataset_folder(root: Path, name: str) -> Path:
    """The folder of dataset ``name`` below ``root``. Raises UserError: there is none, or several mean it."""
    exact, known = root / name, known_name(name)
    if exact.is_dir():
        return exact
    alike = [path for path in visible(root) if path.is_dir() and known is not None and known_name(path.name) == known]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise UserError(
            f"{root} has {', '.join(path.name for path in alike)}, which all mean {known}; name one of them {name}."
        )
    raise UserError(f"Dataset folder {exact} does not exist; put {name} there or name its parent with --dataset_path.")


def _array_split(images: np.ndarray, labels: Sequence[int] | np.ndarray, size: Size) -> Split:
    """``images`` uint8 ``[N, C, H, W]`` held in memory, resized when they are read if ``size`` is another."""
    pixels = torch.from_numpy(images)
    targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    if len(pixels) != len(targets) or pixels.dtype != torch.uint8:
        raise ValueError(f"{len(targets)} labels but images of shape {tuple(pixels.shape)} {pixels.dtype}")

    return Split(targets, lambda indices: resized(pixels[torch.as_tensor(indices, dtype=torch.int64)], size))


def _cifar(folder: Path, inner: str, names: list[str], label_key: str, classes: int, size: Size) -> Split:
    """No md5 is checked: the layout is what matters, and re-encoded copies are welcome; shapes and labels are checked."""
    place = next((base for base in (folder / inner, folder) if any((base / name).is_file() for name in names)), None)
    if place is None:
        raise LayoutError(f"{inner}/{names[0]}", folder)
    images, labels = [], []
    for name in names:
        with open(place / name, "rb") as file:
            batch = read_pickle(file)
        pixels, known = np.asarray(batch["data"]), np.asarray(batch[label_key])
        if pixels.dtype != np.uint8 or known.dtype.kind not in "iu":
            raise ValueError(f"{name} holds pixels of {pixels.dtype} and labels of {known.dtype}, not of uint8 and integers")
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels += known.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"labels outside 0..{classes - 1}")
    return _array_split(np.concatenate(images), labels, size)


def _cifar10(folder: Path, train: bool, size: Size) -> Split:
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    return _cifar(folder, "cifar-10-batches-py", names, "labels", 10, size)


def _cifar100(folder: Path, train: bool, size: Size) -> Split:
    return _cifar(folder, "cifar-100-python", ["train" if train else "test"], "fine_labels", 100, size)


def _mnist(folder: Path, train: bool, size: Size) -> Split:
    if not (folder / "MNIST").is_dir():
        raise LayoutError("MNIST/raw/*-ubyte", folder)
    data = MNIST(str(folder), train=train, download=False)
    return _array_split(data.data.numpy()[:, None], data.targets.numpy(), size)


_OPENERS: dict[str, Callable[[Path, bool, Size], Split]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "gtsrb": gtsrb,
    "tiny": tiny_imagenet,
    "mnist": _mnist,
    "celeba": celeba,
    "imagenet": partial(image_folder, test_names=("val", "test")),  # as BB
}
