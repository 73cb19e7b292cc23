"""BackdoorBench's dataset names -> uint8 tensors, read from the layouts BB keeps on disk (never downloaded)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from fmp_core.data.images import Size, read_images
from fmp_core.errors import UserError
from fmp_core.storage.unpickler import RefusedError, read_pickle


@dataclass(frozen=True)
class DatasetFacts:
    """What BB knows of a dataset (``utils/aggregate_block/dataset_and_transform_generate.py``)."""

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
    "imagenet": DatasetFacts(1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
FOLDER_CROP_PADDING = 2  # for image folders BB does not know; 4 would cut a corner trigger out of half the images


def dataset_facts(name: str, size: Size) -> DatasetFacts:
    """BB's facts of ``name``; a dataset BB does not know is an image folder with pixels in [0,1] as they are."""
    channels = size[2]
    unknown = DatasetFacts(None, size, (0.0,) * channels, (1.0,) * channels, crop_padding=FOLDER_CROP_PADDING)
    return FACTS.get(name, unknown)


@dataclass(frozen=True)
class Split:
    """A training or test set: ``labels`` int64 ``[N]``; ``read(indices)`` gives uint8 ``[n, C, H, W]``."""

    labels: Tensor
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


# What parsing a damaged file can raise, in our code or in torchvision's.
_BAD_CONTENT = (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError)


def open_split(root: str | Path, name: str, train: bool, size: Size) -> Split:
    """Open one split of dataset ``name`` below ``root/name``; images of folder datasets are decoded only when read.

    Raises:
        UserError: the folder or a file of it is missing or damaged; says where the data is expected.
    """
    folder = Path(root) / name
    if not folder.is_dir():
        raise UserError(f"Dataset folder {folder} does not exist; put {name} there or name its parent with --dataset_path.")
    openers = {"cifar10": _cifar10, "cifar100": _cifar100, "gtsrb": _gtsrb, "tiny": _tiny, "mnist": _mnist}
    try:
        return openers.get(name, _image_folder)(folder, train, size)
    except FileNotFoundError as error:
        missing = error.filename or error
        raise UserError(f"Dataset {name} in {folder} is incomplete: {missing} is missing; unpack the dataset again.") from None
    except RefusedError as error:
        raise UserError(f"Dataset {name} in {folder} was refused: it asks for {error}; unpack the dataset again.") from None
    except (OSError, EOFError, *_BAD_CONTENT) as error:
        raise UserError(f"Dataset {name} in {folder} cannot be read ({error}); unpack the dataset again.") from None


def _array_split(images: np.ndarray, labels: Sequence[int] | np.ndarray, size: Size) -> Split:
    """``images`` uint8 ``[N, C, H, W]`` held in memory."""
    height, width, channels = size
    pixels = torch.from_numpy(images)
    targets = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    if pixels.shape != (len(targets), channels, height, width) or pixels.dtype != torch.uint8:
        raise ValueError(f"{len(targets)} labels but images of shape {tuple(pixels.shape)} {pixels.dtype}")
    return Split(targets, lambda indices: pixels[torch.as_tensor(indices, dtype=torch.int64)])


def _file_split(paths: Sequence[Path], labels: Sequence[int], size: Size) -> Split:
    return Split(
        torch.tensor(labels, dtype=torch.int64),
        lambda indices: read_images([paths[int(i)] for i in indices], size),
    )


def _cifar_batch(path: Path, label_key: str) -> tuple[np.ndarray, list[int]]:
    # The originals were written by Python 2, hence latin1 (as torchvision's CIFAR10 does). No md5 is checked: the layout is
    # what matters, and re-encoded copies are welcome; shapes and labels are checked instead.
    with open(path, "rb") as file:
        batch = read_pickle(file)
    return np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32), batch[label_key]


def _cifar(files: list[Path], label_key: str, classes: int, size: Size) -> Split:
    batches = [_cifar_batch(path, label_key) for path in files]
    labels = [label for _, batch in batches for label in batch]
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"labels outside 0..{classes - 1}")
    return _array_split(np.concatenate([images for images, _ in batches]), labels, size)


def _cifar10(folder: Path, train: bool, size: Size) -> Split:
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    return _cifar([folder / "cifar-10-batches-py" / name for name in names], "labels", 10, size)


def _cifar100(folder: Path, train: bool, size: Size) -> Split:
    return _cifar([folder / "cifar-100-python" / ("train" if train else "test")], "fine_labels", 100, size)


def _gtsrb(folder: Path, train: bool, size: Size) -> Split:
    """``Train/000xx/GT-000xx.csv`` or ``Test/GT-final_test.csv``: ';' separated, column 0 file, column 7 class."""
    tables = [folder / "Train" / f"{c:05d}" / f"GT-{c:05d}.csv" for c in range(43)]
    paths: list[Path] = []
    labels: list[int] = []
    for table in tables if train else [folder / "Test" / "GT-final_test.csv"]:
        with open(table, newline="") as file:
            rows = list(csv.reader(file, delimiter=";"))[1:]
        paths += [table.parent / row[0] for row in rows]
        labels += [int(row[7]) for row in rows]
    return _file_split(paths, labels, size)


def _tiny(folder: Path, train: bool, size: Size) -> Split:
    return _image_folder(folder / "tiny-imagenet-200", train, size)


def _mnist(folder: Path, train: bool, size: Size) -> Split:
    data = MNIST(str(folder), train=train, download=False)
    return _array_split(data.data.numpy()[:, None], data.targets.numpy(), size)


def _image_folder(folder: Path, train: bool, size: Size) -> Split:
    """``train/<class>/*`` and ``val/<class>/*`` (or ``test/``), classes in alphabetical order."""
    names = ["train"] if train else ["val", "test"]
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise FileNotFoundError(2, "no such folder", str(folder / names[0]))
    # Classes are counted on the training folder: a class without test images must not shift the labels of the others.
    classes, numbers = find_classes(str(folder / "train"))
    unknown = sorted({path.name for path in found.iterdir() if path.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{found} has the folder {unknown[0]}, which is no class of {folder / 'train'}")
    samples = make_dataset(str(found), numbers, IMG_EXTENSIONS, allow_empty=not train)
    return _file_split([Path(path) for path, _ in samples], [label for _, label in samples], size)
