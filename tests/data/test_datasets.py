"""CelebA, MNIST, and what BackdoorBench knows of each dataset."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import CIFAR, random_pixels, save_image, write_mnist
from fmp_core import PROJECT
from fmp_core.data.datasets import FACTS, dataset_facts, known_name, open_split
from fmp_core.data.images import read_images
from fmp_core.errors import UserError


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


def test_the_facts_are_those_of_backdoorbench():
    """Its ``utils/aggregate_block/dataset_and_transform_generate.py``: classes, size, mean, std, and whether it flips."""
    zero, one = (0.0,) * 3, (1.0,) * 3
    assert {name: (it.num_classes, it.size, it.mean, it.std, it.flip) for name, it in FACTS.items()} == {
        "cifar10": (10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), True),
        "cifar100": (100, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), False),
        "gtsrb": (43, (32, 32, 3), zero, one, False),
        "tiny": (200, (64, 64, 3), (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), False),
        "mnist": (10, (28, 28, 1), (0.5,), (0.5,), False),
        "celeba": (8, (64, 64, 3), zero, one, False),
        "imagenet": (1000, (224, 224, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False),
    }
    assert {it.crop_padding for it in FACTS.values()} == {4}


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


def test_small_files_that_decode_to_very_many_pixels_are_refused(tmp_path: Path):
    save_image(tmp_path / "large.png", 0, size=(300, 200))
    files = [tmp_path / "large.png"] * 3
    assert read_images(files, CIFAR, 180_000).shape == (3, 3, 32, 32)
    with pytest.raises(UserError, match="it has 300x200 pixels"):
        read_images(files, CIFAR, 179_999)


def test_the_page_of_records_states_every_normalisation() -> None:
    page = (PROJECT / "docs" / "records.md").read_text(encoding="utf-8")
    for name, facts in FACTS.items():
        if facts.mean != (0.0, 0.0, 0.0):
            mean, std = (", ".join(map(str, values)) for values in (facts.mean, facts.std))
            assert f"| `{name}` | {mean} | {std} |" in page
        else:
            assert re.search(rf"`{name}`.*every other name \| 0 \| 1 \|", page)
