"""GTSRB in the layouts people have it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_files import CIFAR, save_image
from fmp_core.data.datasets import open_split
from fmp_core.errors import UserError


def write_gtsrb(root: Path) -> None:
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for label in range(43):
        folder = root / "gtsrb" / "Train" / f"{label:05d}"
        save_image(folder / "00000_00000.ppm", label, size=(40, 30))
        (folder / f"GT-{label:05d}.csv").write_text(f"{head}00000_00000.ppm;40;30;1;1;9;9;{label}\n")
    for number in (0, 1):
        save_image(root / "gtsrb" / "Test" / f"{number:05d}.ppm", 100 + number)
    table = f"{head}00000.ppm;32;32;1;1;9;9;16\n00001.ppm;32;32;1;1;9;9;42\n"
    (root / "gtsrb" / "Test" / "GT-final_test.csv").write_text(table)


def test_gtsrb_is_read_by_its_tables(tmp_path: Path):
    write_gtsrb(tmp_path)
    train, test = (open_split(tmp_path, "gtsrb", part, CIFAR) for part in (True, False))
    assert train.labels.tolist() == list(range(43)) and test.labels.tolist() == [16, 42]
    pixels = train.read([42, 5])
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 3, 3].tolist() == [42, 5] and test.read([1])[0, 0, 0, 0] == 101


def test_gtsrb_without_a_class_names_its_table(tmp_path: Path):
    write_gtsrb(tmp_path)
    (tmp_path / "gtsrb" / "Train" / "00017" / "GT-00017.csv").unlink()
    with pytest.raises(UserError, match=r"00017/GT-00017\.csv is missing"):
        open_split(tmp_path, "gtsrb", True, CIFAR)


HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def gtsrb_torchvision(root: Path) -> None:
    base = root / "gtsrb"
    for label in (0, 1, 2, 10):
        for number in (0, 1):
            save_image(base / "GTSRB" / "Training" / f"{label:05d}" / f"0000{number}.ppm", 10 * label + number)
        rows = "".join(f"0000{number}.ppm;9;9;1;1;9;9;{label}\n" for number in (0, 1))
        (base / "GTSRB" / "Training" / f"{label:05d}" / f"GT-{label:05d}.csv").write_text(HEAD + rows)
    for number in (0, 1):
        save_image(base / "GTSRB" / "Final_Test" / "Images" / f"0000{number}.ppm", 200 + number)
    (base / "GT-final_test.csv").write_text(f"{HEAD}00001.ppm;9;9;1;1;9;9;2\n00000.ppm;9;9;1;1;9;9;10\n")


def gtsrb_official(root: Path) -> None:
    gtsrb_torchvision(root)
    (root / "gtsrb" / "GTSRB" / "Final_Training").mkdir()
    (root / "gtsrb" / "GTSRB" / "Training").rename(root / "gtsrb" / "GTSRB" / "Final_Training" / "Images")


def gtsrb_kaggle(root: Path) -> None:
    base = root / "GTSRB"  # another way to write the name
    for label in (0, 1, 2, 10):
        for number in (0, 1):
            save_image(base / "Train" / str(label) / f"0000{label}_{number}.png", 10 * label + number)
        (base / "Train" / str(label) / ".ipynb_checkpoints").mkdir()
        save_image(base / "Train" / str(label) / ".ipynb_checkpoints" / "a.png", 99)
    for number in (0, 1):
        save_image(base / "Test" / f"0000{number}.png", 200 + number)
    rows = "9,9,1,1,9,9,2,Test/00001.png\n9,9,1,1,9,9,10,Test/00000.png\n"
    (base / "Test.csv").write_text(f"Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path\n{rows}")


@pytest.mark.parametrize("names", [("Train", "Test"), ("train", "test"), ("Train", "val")])
def test_folders_of_classes_are_numbered_by_their_names(names: tuple[str, str], tmp_path: Path):
    """In both parts, without any table: as text 10 comes before 2."""
    for name in names:
        for label in (2, 10, 0):
            save_image(tmp_path / "gtsrb" / name / str(label) / "a.png", label)
    for part in (True, False):
        split = open_split(tmp_path, "gtsrb", part, CIFAR)
        assert split.labels.tolist() == [0, 2, 10] == split.read(range(3))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("lay_out", [gtsrb_torchvision, gtsrb_official, gtsrb_kaggle])
def test_gtsrb_is_read_as_people_have_it(lay_out: Callable[[Path], None], tmp_path: Path):
    """... in the order of BackdoorBench: training images class by class, test images as their table lists them."""
    lay_out(tmp_path)
    train, test = (open_split(tmp_path, "gtsrb", part, CIFAR) for part in (True, False))
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 10, 10] and test.labels.tolist() == [2, 10]
    assert train.read(range(8))[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21, 100, 101]
    assert test.read([0, 1])[:, 0, 0, 0].tolist() == [201, 200]


def test_gtsrb_in_no_known_layout_says_what_is_wanted_and_found(tmp_path: Path):
    (tmp_path / "gtsrb" / "signs").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Train/00000/GT-00000\.csv.*torchvision.*Kaggle.* is missing; .*gtsrb has signs/"):
        open_split(tmp_path, "gtsrb", True, CIFAR)


@pytest.mark.parametrize("row", ["00000.ppm;32;32\n", "00000.ppm;32;32;1;1;9;9;stop\n", "\n"])
def test_a_damaged_gtsrb_table_is_refused(row: str, tmp_path: Path):
    write_gtsrb(tmp_path)
    (tmp_path / "gtsrb" / "Test" / "GT-final_test.csv").write_text("head\n" + row)
    with pytest.raises(UserError, match="Dataset gtsrb"):
        open_split(tmp_path, "gtsrb", False, CIFAR)
