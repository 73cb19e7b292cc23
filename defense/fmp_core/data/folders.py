"""Datasets that are kept as image files, in the layouts in which people have them.

The order of the images is BackdoorBench's in every layout, since a record names test images by their position.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from fmp_core.data.images import Size, Split, file_split

HIDDEN = (".", "__MACOSX")  # beginnings of names that are no part of a dataset
LARGEST_TABLE = 256 * 2**20  # bytes; CelebA's has 27 million
LOGGER = logging.getLogger("fmp_core")


class LayoutError(Exception):
    """A dataset lies in no layout that is read; the message says which is wanted and what was found."""

    def __init__(self, wanted: str, folder: Path):
        names = sorted(path.name + "/" * path.is_dir() for path in visible(folder))
        found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
        super().__init__(f"is incomplete or laid out otherwise: {wanted} is missing; {folder} has {found}.")


def visible(folder: Path) -> list[Path]:
    """What ``folder`` (none if it is no folder) holds, but for hidden files and folders (``.ipynb_checkpoints``) and those that
    macOS adds to archives (``__MACOSX``)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN)) if folder.is_dir() else []


def image_folder(folder: Path, train: bool, size: Size, test_names: Sequence[str] = ("test", "val")) -> Split:
    """``train/<class>/*`` and ``test/<class>/*`` (or ``val/``), classes in alphabetical order.

    Folders without images are no classes. The whole may lie one or two folders deeper. Where ``test/`` and ``val/`` both have
    labelled images, the first of ``test_names`` is used, and the log says so.
    """
    base = _descend(folder, lambda place: _named(place, "train") is not None)
    training = _named(base, "train") if base else None
    if base is None or training is None:
        raise LayoutError("train/<class>/*.png", folder)
    training = _descend(training, lambda place: len(_classes(place)) > 1) or training
    # Classes are counted on the training folder: a class without test images must not shift the labels of the others.
    classes = _classes(training)
    if train:
        return _class_split(training, classes, size)
    named = [place for name in test_names if (place := _named(base, name)) is not None]
    places = [_descend(place, lambda inner: not {*classes}.isdisjoint(_classes(inner))) or place for place in named]
    usable = [place for place in places if _classes(place)]
    if not usable:
        raise LayoutError(f"{test_names[0]}/<class>/*.png (or {test_names[1]}/)", base)
    labelled = [place for place in usable if not {*classes}.isdisjoint(_classes(place))] or usable
    if len(labelled) > 1:
        LOGGER.warning("%s has labelled images in %s; %s is the test set", base, " and ".join(test_names), labelled[0].name)
    unknown = [name for name in _classes(labelled[0]) if name not in classes]
    if unknown:
        raise ValueError(f"{labelled[0]} has the folder {unknown[0]}, which is no class of {training}")
    return _class_split(labelled[0], classes, size)


def _named(folder: Path, name: str) -> Path | None:
    return next((path for path in visible(folder) if path.name.lower() == name and path.is_dir()), None)


def _descend(folder: Path, fits: Callable[[Path], bool]) -> Path | None:
    """``folder``, or the only folder in it, or the only one in that, whichever fits first."""
    for _ in range(3):
        if fits(folder):
            return folder
        inner = [path for path in visible(folder) if path.is_dir()]
        if len(inner) != 1:
            return None
        folder = inner[0]
    return None


def _classes(folder: Path) -> list[str]:
    """Folders in ``folder`` that hold an image, at any depth; in alphabetical order."""
    return [path.name for path in visible(folder) if path.is_dir() and _has_image(path)]


def _has_image(folder: Path) -> bool:
    for _, inside, files in os.walk(folder, followlinks=True):
        if any(name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".") for name in files):
            return True
        inside[:] = [name for name in inside if not name.startswith(".")]
    return False


def _class_split(folder: Path, classes: list[str], size: Size) -> Split:
    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
    samples = [sample for sample in samples if "/." not in sample[0].removeprefix(str(folder))]
    if not samples:
        raise ValueError(f"{folder} holds no image")
    return file_split([Path(path) for path, _ in samples], [label for _, label in samples], size)


def tiny_imagenet(folder: Path, train: bool, size: Size) -> Split:
    """Tiny ImageNet unpacked (``val/images`` and ``val/val_annotations.txt``), or with a folder for each class in ``val/``."""
    base = next((place for place in (folder / "tiny-imagenet-200", folder) if (place / "train").is_dir()), folder)
    images, table = base / "val" / "images", base / "val" / "val_annotations.txt"
    if train or not table.is_file() or not _has_image(images):
        return image_folder(base, train, size, test_names=("val", "test"))  # its test/ has no labels
    numbers = {name: number for number, name in enumerate(_classes(base / "train"))}
    rows = sorted((fields[1], fields[0]) for fields in _table(table))
    return file_split([images / _plain(name) for _, name in rows], [numbers[label] for label, _ in rows], size)


GTSRB_LAYOUTS = (
    "Train/00000/GT-00000.csv and Test/GT-final_test.csv (BackdoorBench), GTSRB/Training and GT-final_test.csv (torchvision), "
    "Final_Training/Images and Final_Test/Images (the original archives) or Train.csv and Test.csv (Kaggle)"
)


def gtsrb(folder: Path, train: bool, size: Size) -> Split:
    """German traffic signs as in GTSRB_LAYOUTS; training images by class, test images in the order of their table,
    or by class, too, where there is none."""
    for base in (folder, *(folder / name for name in ("GTSRB", "gtsrb", "gtsrb/GTSRB"))):
        if train:
            for name in ("Train", "train", "Training", "Final_Training/Images"):
                if classes := _numbered(base / name):
                    return file_split(*_gtsrb_classes(classes), size)
        else:
            tables = (base / inner / "GT-final_test.csv" for inner in ("Test", "", "..", "Final_Test", "Final_Test/Images"))
            table = next((path for path in tables if path.is_file()), None)
            images = next((base / inner for inner in ("Test", "Final_Test/Images") if (base / inner).is_dir()), None)
            if table and images:
                return file_split(*_gtsrb_rows(table, images), size)
            if (base / "Test.csv").is_file():
                rows = list(csv.DictReader(_lines(base / "Test.csv")))  # Kaggle's
                return file_split([base / _plain(row["Path"]) for row in rows], [int(row["ClassId"]) for row in rows], size)
            for name in ("Test", "test", "val"):
                if classes := _numbered(base / name):
                    return file_split(*_gtsrb_classes(classes), size)
    raise LayoutError(f"one of {GTSRB_LAYOUTS}", folder)


def _numbered(folder: Path) -> list[Path]:
    """The folders of classes in ``folder`` that are named by numbers, which are the labels whatever their order as text.

    Empty ones do not count: BB's reader makes them where it finds none.
    """
    classes = [path for path in visible(folder) if path.is_dir() and path.name.isdecimal() and any(path.iterdir())]
    return sorted(classes, key=lambda path: int(path.name))


def _gtsrb_classes(classes: list[Path]) -> tuple[list[Path], list[int]]:
    """Images of the folders of classes: those in their tables, or all if there is no table."""
    paths: list[Path] = []
    labels: list[int] = []
    tables = [place / f"GT-{place.name}.csv" for place in classes]
    has_tables = any(table.is_file() for table in tables)
    for place, table in zip(classes, tables, strict=True):
        if has_tables:
            files, numbers = _gtsrb_rows(table, place)
        else:
            files = [path for path in visible(place) if path.suffix.lower() in IMG_EXTENSIONS]
            numbers = [int(place.name)] * len(files)
        paths += files
        labels += numbers
    return paths, labels


def _gtsrb_rows(table: Path, images: Path) -> tuple[list[Path], list[int]]:
    """The original tables: ';' separated, column 0 file, column 7 class."""
    rows = list(csv.reader(_lines(table), delimiter=";"))[1:]
    return [images / _plain(row[0]) for row in rows], [int(row[7]) for row in rows]


CELEBA_ATTRIBUTES = (18, 31, 21)  # Heavy_Makeup, Smiling, Mouth_Slightly_Open: BB's eight classes (dataset/CelebA.py)


def celeba(folder: Path, train: bool, size: Size) -> Split:
    """CelebA as torchvision lays it out, with BB's eight classes of three attributes."""
    base = next((place for place in (folder / "celeba", folder) if (place / "list_attr_celeba.txt").is_file()), None)
    if base is None:
        raise LayoutError("celeba/list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba/", folder)
    parts = dict(_table(base / "list_eval_partition.txt"))
    paths, labels = [], []
    for name, *values in list(_table(base / "list_attr_celeba.txt"))[2:]:
        if parts[name] == ("0" if train else "2"):
            first, second, third = (values[number] == "1" for number in CELEBA_ATTRIBUTES)
            labels.append((first << 2) + (second << 1) + third)
            paths.append(base / "img_align_celeba" / _plain(name))
    return file_split(paths, labels, size)


def _table(path: Path) -> Iterable[list[str]]:
    return (fields for line in _lines(path) if (fields := line.split()))


def _lines(path: Path) -> list[str]:
    if path.is_file() and path.stat().st_size > LARGEST_TABLE:
        raise ValueError(f"{path} is larger than {LARGEST_TABLE >> 20} MiB")
    return path.read_text(encoding="utf-8").splitlines()


def _plain(name: str) -> str:
    """A file's name in a table, which may not lead out of the dataset."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"the file name {name[:80]!r} leads out of the dataset")
    return name
