"""Datasets in the layouts BackdoorBench keeps on disk; their pickles are data, and damage is named."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.data.datasets import FACTS, dataset_facts, known_name, open_split
from fmp_core.errors import UserError
from PIL import Image

CIFAR = (32, 32, 3)


def random_pixels(count: int, seed: int = 0, shape: tuple[int, ...] = (3, 32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))


def write_cifar10(root: Path, images: np.ndarray, labels: list[int]) -> Path:
    """``images`` in six batches, the last of them the test batch; returns the folder of batches."""
    folder = root / "cifar10" / "cifar-10-batches-py"
    size = len(labels) // 6
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(number * size, (number + 1) * size)
        write_pickle(folder / name, {"data": images[rows].reshape(size, -1), "labels": labels[rows]})
    return folder


def python2_batch(images: np.ndarray, label_key: bytes, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle (protocol 2) wrote the originals: byte strings, numpy 1 names."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    rows = images.reshape(len(labels), -1)
    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"(" + b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + numbers + text(b"batch_label") + text(b"test \xe9") + b"u."


def save_image(path: Path, colour: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 255 - colour, 7)).save(path)


# CIFAR


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar10_is_five_batches_and_a_test_batch(protocol: int, tmp_path: Path):
    images, labels = random_pixels(12), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 3, 5]
    folder = write_cifar10(tmp_path, images, labels)
    for path in folder.iterdir():
        write_pickle(path, pickle.loads(path.read_bytes()), protocol)
    train, test = (open_split(tmp_path, "cifar10", part, CIFAR) for part in (True, False))
    assert (len(train), len(test)) == (10, 2)
    assert train.labels.tolist() == labels[:10] and test.labels.tolist() == labels[10:]
    assert np.array_equal(train.read(range(10)).numpy(), images[:10])
    assert np.array_equal(test.read([1, 0]).numpy(), images[[11, 10]])
    assert train.read([0]).dtype == torch.uint8


def test_cifar100_has_fine_labels(tmp_path: Path):
    for name, seed in (("train", 1), ("test", 2)):
        content = {"data": random_pixels(3, seed).reshape(3, -1), "fine_labels": [0, 99, seed], "coarse_labels": [1, 1, 1]}
        write_pickle(tmp_path / "cifar100" / "cifar-100-python" / name, content)
    assert open_split(tmp_path, "cifar100", True, CIFAR).labels.tolist() == [0, 99, 1]
    test = open_split(tmp_path, "cifar100", False, CIFAR)
    assert np.array_equal(test.read([2]).numpy(), random_pixels(3, 2)[[2]])


def test_batches_of_python_2_are_read(tmp_path: Path):
    images = random_pixels(2)
    content = python2_batch(images, b"labels", [7, 1])
    assert pickle.loads(content, encoding="latin1")["labels"] == [7, 1]  # a genuine pickle
    write_pickle(tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch", content)
    test = open_split(tmp_path, "cifar10", False, CIFAR)
    assert test.labels.tolist() == [7, 1] and np.array_equal(test.read([0, 1]).numpy(), images)


class Attack:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["data", "labels", "whole"])
def test_a_batch_that_asks_for_a_foreign_global_is_refused_and_not_run(place: str, protocol: int, tmp_path: Path):
    trace = tmp_path / "trace"
    attack = Attack(os.system, f"touch {trace}")
    content: Any = {"data": random_pixels(1).reshape(1, -1), "labels": [1]}
    content = attack if place == "whole" else {**content, place: [attack]}
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch"
    write_pickle(path, content, protocol)
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the attack itself must work, or this test proves nothing"
    trace.unlink()
    with pytest.raises(UserError, match=rf"asks for {os.system.__module__}\.system"):
        open_split(tmp_path, "cifar10", False, CIFAR)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_builtins_are_foreign_too(name: str, tmp_path: Path):
    write_pickle(
        tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch", b"c__builtin__\n" + name.encode() + b"\n(S'1'\ntR."
    )
    with pytest.raises(UserError, match=rf"asks for (builtins|__builtin__)\.{name}"):
        open_split(tmp_path, "cifar10", False, CIFAR)


TEST_BATCHES: dict[str, Any] = {
    "label too large": {"data": random_pixels(2).reshape(2, -1), "labels": [1, 10]},
    "label negative": {"data": random_pixels(2).reshape(2, -1), "labels": [-1, 0]},
    "a label too few": {"data": random_pixels(2).reshape(2, -1), "labels": [1]},
    "half an image": {"data": random_pixels(1).reshape(1, -1)[:, :1000], "labels": [1]},
    "no labels": {"data": random_pixels(1).reshape(1, -1)},
    "no data": {"labels": [1]},
    "empty": b"",
    "not a pickle": b"hello world",
    "truncated": pickle.dumps({"data": random_pixels(1).reshape(1, -1), "labels": [1]}, protocol=2)[:500],
}
NOT_DICTS: dict[str, Any] = {"a list": [1, 2], "none": None, "labels none": {**TEST_BATCHES["a label too few"], "labels": None}}


@pytest.mark.parametrize(
    "content",
    [
        *TEST_BATCHES.values(),
        *NOT_DICTS.values(),
    ],
    ids=[*TEST_BATCHES, *NOT_DICTS],
)
def test_a_damaged_batch_is_refused(content: Any, tmp_path: Path):
    write_pickle(tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch", content)
    with pytest.raises(UserError, match=r"Dataset cifar10 in .* cannot be read") as caught:
        open_split(tmp_path, "cifar10", False, CIFAR)
    assert str(tmp_path / "cifar10") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(64, 64, 3), (20, 24, 3), (32, 32, 1)])
def test_images_take_the_size_that_the_record_says(size: tuple[int, int, int], tmp_path: Path):
    """CIFAR-10 records at 64 or 224 pixels are BB's own; it resizes as torchvision does."""
    images = random_pixels(6)
    write_cifar10(tmp_path, images, [0] * 6)
    read = open_split(tmp_path, "cifar10", False, size).read([0])[0]
    image = Image.fromarray(images[5].transpose(1, 2, 0)).convert("RGB" if size[2] == 3 else "L")
    expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).reshape(size)
    assert np.array_equal(read.permute(1, 2, 0).numpy(), expected)


# Folders and files that are missing


def test_a_missing_dataset_says_where_it_belongs(tmp_path: Path):
    with pytest.raises(UserError, match=r"data/cifar10 does not exist; .* --dataset_path"):
        open_split(tmp_path / "data", "cifar10", True, CIFAR)


def test_a_missing_batch_is_named(tmp_path: Path):
    (write_cifar10(tmp_path, random_pixels(6), [0] * 6) / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py/data_batch_4 is missing; unpack"):
        open_split(tmp_path, "cifar10", True, CIFAR)
    assert len(open_split(tmp_path, "cifar10", False, CIFAR)) == 1


@pytest.mark.parametrize("name", ["cifar100", "gtsrb", "tiny", "mnist", "digits"])
def test_an_empty_folder_is_incomplete(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"Dataset {name} in .*{name}") as caught:
        open_split(tmp_path, name, True, dataset_facts(name, CIFAR).size)
    assert "\n" not in str(caught.value)


# GTSRB


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


# Folders of images


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


# CelebA


def test_celeba_has_the_eight_classes_of_backdoorbench(tmp_path: Path):
    base = tmp_path / "celeba" / "celeba"
    names = " ".join(f"attribute{number}" for number in range(40))
    rows, parts = [], []
    for number, on in enumerate([(18,), (31,), (21,), (18, 31, 21), ()]):
        save_image(base / "img_align_celeba" / f"{number}.jpg", 0, size=(17, 21))
        rows.append(f"{number}.jpg " + " ".join("1" if a in on else "-1" for a in range(40)))
        parts.append(f"{number}.jpg {2 if number > 2 else 0}")
    (base / "list_attr_celeba.txt").write_text("\n".join(["5", names, *rows]))
    (base / "list_eval_partition.txt").write_text("\n".join(parts))
    train, test = (open_split(tmp_path, "celeba", part, (64, 64, 3)) for part in (True, False))
    assert train.labels.tolist() == [4, 2, 1] and test.labels.tolist() == [7, 0]
    assert test.read([1]).shape == (1, 3, 64, 64)


# MNIST


def write_mnist(root: Path, images: np.ndarray, labels: list[int]) -> Path:
    raw = root / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        sizes = struct.pack(">iiii", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(labels)) + bytes(labels))
    return raw


def test_mnist_has_one_channel(tmp_path: Path):
    images = random_pixels(3, shape=(28, 28))
    write_mnist(tmp_path, images, [4, 0, 9])
    split = open_split(tmp_path, "mnist", True, (28, 28, 1))
    assert split.labels.tolist() == [4, 0, 9]
    assert np.array_equal(split.read([2, 0]).numpy(), images[[2, 0], None])


def test_mnist_may_be_wanted_larger_and_in_colour(tmp_path: Path):
    write_mnist(tmp_path, random_pixels(3, shape=(28, 28)), [4, 0, 9])
    read = open_split(tmp_path, "mnist", True, CIFAR).read([0, 1])
    assert read.shape == (2, 3, 32, 32) and torch.equal(read[:, 0], read[:, 2])
    facts = dataset_facts("mnist", CIFAR)
    assert (facts.mean, facts.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("keep", [0, 100, 3])
def test_a_truncated_mnist_is_refused(keep: int, tmp_path: Path):
    path = write_mnist(tmp_path, random_pixels(3, shape=(28, 28)), [4, 0, 9]) / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="Dataset mnist"):
        open_split(tmp_path, "mnist", True, (28, 28, 1))


# What BackdoorBench knows of them


def test_facts_are_backdoorbenchs():
    known = {name: (facts.num_classes, facts.size) for name, facts in FACTS.items()}
    assert known["cifar10"] == (10, (32, 32, 3)) and known["cifar100"] == (100, (32, 32, 3))
    assert known["gtsrb"] == (43, (32, 32, 3)) and known["tiny"] == (200, (64, 64, 3))
    assert known["mnist"] == (10, (28, 28, 1)) and known["imagenet"] == (1000, (224, 224, 3))
    assert FACTS["cifar10"].mean == (0.4914, 0.4822, 0.4465) and FACTS["cifar10"].std == (0.247, 0.243, 0.261)
    assert FACTS["gtsrb"].mean == (0, 0, 0) and FACTS["gtsrb"].std == (1, 1, 1)
    assert [name for name, facts in FACTS.items() if facts.flip] == ["cifar10"]


@pytest.mark.parametrize(
    "written, known",
    [
        ("tiny-imagenet-200", "tiny"), ("TinyImageNet", "tiny"), ("GTSRB", "gtsrb"), ("CIFAR10", "cifar10"),
        ("cifar-10", "cifar10"), ("Cifar_100", "cifar100"), ("ILSVRC2012", "imagenet"), ("imagenette", None), ("", None),
    ],
)  # fmt: skip
def test_names_may_be_written_otherwise(written: str, known: str | None):
    assert known_name(written) == known
    if known:
        assert dataset_facts(written, FACTS[known].size) == FACTS[known]


def test_two_folders_of_one_dataset_are_not_guessed_between(tmp_path: Path):
    for name in ("CIFAR10", "cifar-10"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="CIFAR10, cifar-10, which all mean cifar10; name one"):
        open_split(tmp_path, "cifar10", True, CIFAR)


def test_mean_and_std_can_be_given():
    facts = dataset_facts("cifar10", CIFAR, mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert (facts.mean, facts.std, facts.flip) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), True)


def test_an_unknown_datasets_pixels_stay_as_they_are():
    facts = dataset_facts("toys", (16, 16, 1))
    assert (facts.num_classes, facts.size, facts.mean, facts.std) == (None, (16, 16, 1), (0.0,), (1.0,))
