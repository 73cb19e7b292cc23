"""CIFAR's pickles: data, and damage is named; missing files are named."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import CIFAR, python2_batch, random_pixels, save_image, write_cifar10, write_pickle
from fmp_core.data.datasets import dataset_facts, open_split
from fmp_core.errors import UserError
from PIL import Image


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


def test_cifar100_may_be_folders_of_images(tmp_path: Path):
    for part, label in (("train", 0), ("train", 1), ("test", 1)):
        save_image(tmp_path / "cifar100" / part / f"{label:02d}" / "a.png", 9)
    save_image(tmp_path / "cifar100" / "test" / "00" / "a.png", 9)
    assert open_split(tmp_path, "cifar100", True, CIFAR).labels.tolist() == [0, 1]


def test_labels_may_be_an_array(tmp_path: Path):
    content = {"data": random_pixels(2).reshape(2, -1), "labels": np.array([7, 1])}
    write_pickle(tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch", content)
    assert open_split(tmp_path, "cifar10", False, CIFAR).labels.tolist() == [7, 1]


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
    "pixels of floats": {"data": random_pixels(2).reshape(2, -1) / 255, "labels": [1, 1]},
    "pixels above 255": {"data": random_pixels(2).reshape(2, -1).astype(np.int64) + 255, "labels": [1, 1]},
    "labels of floats": {"data": random_pixels(2).reshape(2, -1), "labels": [1.5, 2.0]},
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
