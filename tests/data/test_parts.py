"""Which images are of which part of a dataset, and what augmentation leaves of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from dataset_files import random_pixels, save_image, write_mnist
from fmp_core.data.datasets import dataset_facts, open_split
from fmp_core.models.training import Crops


def test_mnist_is_tested_on_its_own_test_images(tmp_path: Path) -> None:
    parts = {"train": (random_pixels(3, 0, (28, 28)), [4, 0, 9]), "t10k": (random_pixels(2, 1, (28, 28)), [7, 1])}
    for name, (images, labels) in parts.items():
        write_mnist(tmp_path, images, labels, (name,))
    for train, (images, labels) in zip((True, False), parts.values(), strict=True):
        split = open_split(tmp_path, "mnist", train, (28, 28, 1))
        assert split.labels.tolist() == labels
        assert np.array_equal(split.read(range(len(labels))).numpy()[:, 0], images)


def test_validation_images_of_celeba_are_in_neither_part(tmp_path: Path) -> None:
    base, names = tmp_path / "celeba", [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        save_image(base / "img_align_celeba" / name, number)
    rows = [f"{name} " + " ".join(["-1"] * 40) for name in names]
    (base / "list_attr_celeba.txt").write_text("\n".join(["6", "attributes", *rows]))
    (base / "list_eval_partition.txt").write_text("\n".join(f"{name} {n % 3}" for n, name in enumerate(names)))
    train, test = (open_split(tmp_path, "celeba", part, (8, 8, 3)) for part in (True, False))
    assert [split.read([0, 1])[:, 0, 0, 0].tolist() for split in (train, test)] == [[0, 3], [2, 5]]
    assert len(train) == len(test) == 2


def test_a_corner_trigger_stays_in_the_picture() -> None:
    """In each crop of images of a folder, of which it is not known what they show: so none of them is mirrored, either."""
    images = torch.zeros(500, 1, 16, 16, dtype=torch.uint8)
    images[:, :, -3:, -3:] = 255
    moved = Crops.draw(500, torch.Generator().manual_seed(0), dataset_facts("my signs", (16, 16, 1)))(images)
    assert (moved[:, :, 8:, 8:] > 0).flatten(1).any(1).all() and not (moved[:, :, :, :8] > 0).any()
    assert len(moved.unique(dim=0)) > 4  # and yet they are moved
