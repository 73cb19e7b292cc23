"""Folders of images as datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_files import CIFAR, random_pixels, save_image
from fmp_core.data.datasets import open_split
from fmp_core.data.images import read_images
from fmp_core.errors import UserError
from PIL import Image


def test_an_unknown_dataset_is_a_folder_of_images(tmp_path: Path):
    for part in ("train", "test"):
        for number, name in enumerate(["ant", "bee", "cat"]):
            save_image(tmp_path / "toys" / part / name / "a.png", 10 * number)
    train = open_split(tmp_path, "toys", True, (8, 8, 3))
    assert train.labels.tolist() == [0, 1, 2]
    assert train.read([2]).shape == (1, 3, 8, 8) and train.read([2])[0, :, 0, 0].tolist() == [20, 235, 7]
    assert open_split(tmp_path, "toys", False, (8, 8, 3)).labels.tolist() == [0, 1, 2]


def test_val_stands_for_a_missing_test_folder(tmp_path: Path):
    save_image(tmp_path / "toys" / "train" / "ant" / "a.png", 90)
    save_image(tmp_path / "toys" / "val" / "ant" / "a.png", 50)
    assert open_split(tmp_path, "toys", False, CIFAR).read([0])[0, 0, 0, 0] == 50


def test_test_wins_over_val_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for part, colour in (("train", 1), ("val", 2), ("test", 3)):
        save_image(tmp_path / "toys" / part / "ant" / "a.png", colour)
    with caplog.at_level("WARNING", "fmp_core"):
        assert open_split(tmp_path, "toys", False, CIFAR).read([0])[0, 0, 0, 0] == 3
    assert "has labelled images in test and val; test is the test set" in caplog.text


def test_an_unlabelled_test_folder_is_no_test_set(tmp_path: Path):
    for part in ("train", "val"):
        save_image(tmp_path / "toys" / part / "ant" / "a.png", 2)
    save_image(tmp_path / "toys" / "test" / "images" / "a.png", 3)
    assert open_split(tmp_path, "toys", False, CIFAR).read([0])[0, 0, 0, 0] == 2


@pytest.mark.parametrize("inside", ["", "toys", "archive/toys"])
def test_a_folder_of_images_may_lie_deeper(inside: str, tmp_path: Path):
    """... as archives unpack, with what editors leave, empty folders, and images one folder below their class."""
    base = tmp_path / "toys" / inside
    for part in ("train", "test"):
        for number, name in enumerate(["ant", "bee"]):
            save_image(base / part / name / "images" / "a.png", 10 * number)
            save_image(base / part / name / ".ipynb_checkpoints" / "a-checkpoint.png", 99)
        save_image(base / part / ".ipynb_checkpoints" / "a.png", 99)
        (base / part / "aardvark").mkdir()
    (tmp_path / "toys" / ".DS_Store").touch()
    save_image(tmp_path / "toys" / "__MACOSX" / "toys" / "train" / "ant" / "._a.png", 99)
    for train in (True, False):
        split = open_split(tmp_path, "toys", train, CIFAR)
        assert split.labels.tolist() == [0, 1] and split.read([0, 1])[:, 0, 0, 0].tolist() == [0, 10]


def test_a_split_may_lie_in_a_folder_of_its_own(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            save_image(tmp_path / "toys" / part / part / name / "a.png", 5)
    assert [open_split(tmp_path, "toys", train, CIFAR).labels.tolist() for train in (True, False)] == [[0, 1], [0, 1]]


def test_known_datasets_may_be_folders_of_images(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("airplane", "automobile"):
            save_image(tmp_path / "cifar10" / part / name / "a.png", 5)
    assert open_split(tmp_path, "cifar10", True, CIFAR).labels.tolist() == [0, 1]


def test_tiny_is_read_as_it_is_downloaded(tmp_path: Path):
    """val/ as one folder with annotations: in the order of BackdoorBench, which sorts the images into folders of classes."""
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        save_image(root / "train" / name / "images" / "a.JPEG", 90, size=(64, 64))
    for number in range(4):
        save_image(root / "val" / "images" / f"val_{number}.png", number, size=(64, 64))
    lines = [f"val_{number}.png\tn0{1 + (number + 1) % 2}\t0\t0\t9\t9\n" for number in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    save_image(root / "test" / "images" / "test_0.JPEG", 10, size=(64, 64))
    for name in ("tiny-imagenet-200", "tiny", "TinyImageNet"):
        test = open_split(tmp_path, name, False, (64, 64, 3))
        assert test.labels.tolist() == [0, 0, 1, 1] and test.read(range(4))[:, 0, 0, 0].tolist() == [1, 3, 0, 2]


def test_tiny_is_train_and_val(tmp_path: Path):
    root = tmp_path / "tiny" / "tiny-imagenet-200"
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            save_image(root / part / name / "images" / "a.JPEG", 90, size=(64, 64))
    for train in (True, False):
        split = open_split(tmp_path, "tiny", train, (64, 64, 3))
        assert split.labels.tolist() == [0, 1] and split.read([0, 1]).shape == (2, 3, 64, 64)


def test_tinys_unlabelled_test_folder_is_not_its_test_set(tmp_path: Path):
    root = tmp_path / "tiny" / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        for part in ("train", "val"):
            save_image(root / part / name / "a.JPEG", 90, size=(64, 64))
    save_image(root / "test" / "images" / "test_0.JPEG", 10, size=(64, 64))  # as in tiny-imagenet-200.zip
    assert open_split(tmp_path, "tiny", False, (64, 64, 3)).labels.tolist() == [0, 1]


def test_a_class_without_test_images_does_not_shift_the_labels(tmp_path: Path):
    for part, names in (("train", ["ant", "bee", "cat"]), ("test", ["ant", "cat"])):
        for name in names:
            save_image(tmp_path / "toys" / part / name / "a.png", 90)
    assert open_split(tmp_path, "toys", False, CIFAR).labels.tolist() == [0, 2]


def test_an_empty_class_folder_is_refused(tmp_path: Path):
    (tmp_path / "toys" / "train" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match="Dataset toys"):
        open_split(tmp_path, "toys", True, CIFAR)


@pytest.mark.parametrize("content", [b"", b"P6 nonsense", None])
def test_a_corrupt_image_is_named(content: bytes | None, tmp_path: Path):
    path = tmp_path / "toys" / "train" / "ant" / "b.png"
    save_image(path.with_name("a.png"), 1)
    save_image(path, 2)
    path.write_bytes(path.read_bytes()[:50] if content is None else content)
    split = open_split(tmp_path, "toys", True, CIFAR)
    assert split.read([0]).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"ant/b\.png cannot be decoded"):
        split.read([0, 1])


@pytest.mark.parametrize("kind", ["uint16", "float32", "int32"])
def test_pixels_of_more_than_8_bits_are_refused(kind: str, tmp_path: Path) -> None:
    """Pillow cuts them off at 255: nearly all of a photograph is white then."""
    Image.fromarray(np.linspace(0, 1000, 64).reshape(8, 8).astype(kind)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif cannot be decoded \(its pixels have more than 8 bits"):
        read_images([tmp_path / "deep.tif"], (8, 8, 3))


def test_an_image_that_went_away_is_named(tmp_path: Path):
    save_image(tmp_path / "toys" / "train" / "ant" / "a.png", 1)
    split = open_split(tmp_path, "toys", True, CIFAR)
    (tmp_path / "toys" / "train" / "ant" / "a.png").unlink()
    with pytest.raises(UserError, match=r"ant/a\.png is missing"):
        split.read([0])


def test_images_are_resized_as_torchvision_resizes_them(tmp_path: Path):
    from torchvision.transforms import Resize

    image = Image.fromarray(random_pixels(1, shape=(40, 50, 3))[0])
    (tmp_path / "toys" / "train" / "ant").mkdir(parents=True)
    image.save(tmp_path / "toys" / "train" / "ant" / "a.png")
    read = open_split(tmp_path, "toys", True, CIFAR).read([0])[0]
    assert np.array_equal(read.permute(1, 2, 0).numpy(), np.asarray(Resize((32, 32))(image)))


def test_grey_images_become_three_channels_and_coloured_ones_one(tmp_path: Path):
    folder = tmp_path / "toys" / "train" / "ant"
    folder.mkdir(parents=True)
    Image.new("L", (32, 32), 77).save(folder / "a.png")
    assert open_split(tmp_path, "toys", True, CIFAR).read([0])[0, :, 0, 0].tolist() == [77, 77, 77]
    assert open_split(tmp_path, "toys", True, (32, 32, 1)).read([0]).shape == (1, 1, 32, 32)


@pytest.mark.parametrize("name", ["imagenet", "tiny"])
def test_a_folder_val_is_what_is_tested_on_as_in_backdoorbench(name: str, tmp_path: Path):
    for part, colour in (("train", 1), ("val", 2), ("test", 3)):
        save_image(tmp_path / name / part / "ant" / "a.png", colour)
    assert open_split(tmp_path, name, False, CIFAR).read([0])[0, 0, 0, 0] == 2


def test_a_class_whose_images_are_linked_is_a_class(tmp_path: Path):
    for number, name in enumerate(["ant", "bee", "cat"]):
        save_image(tmp_path / "toys" / "train" / name / "images" / "a.png", 10 * number)
    (tmp_path / "toys" / "train" / "ant" / "images").rename(tmp_path / "other disk")
    (tmp_path / "toys" / "train" / "ant" / "images").symlink_to(tmp_path / "other disk")
    split = open_split(tmp_path, "toys", True, CIFAR)
    assert split.labels.tolist() == [0, 1, 2] and split.read([0, 1, 2])[:, 0, 0, 0].tolist() == [0, 10, 20]
