"""What is reported of a model without a backdoor, and how long models are trained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dataset_files import random_pixels, write_cifar10
from fmp_core.attacks.make_record import make_plan
from fmp_core.attacks.recipes import FOLDER_RECIPE, RECIPES
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.attacks.train_model import clean_metrics, recipe
from torch import Tensor, nn


class Brightest(nn.Module):
    """Logits are 4 * the mean of each channel in [0,1]."""

    def forward(self, pixels: Tensor) -> Tensor:
        return 4 * pixels.mean((2, 3))


def test_sums_and_means_of_a_clean_model_are_over_its_batches() -> None:
    """Five red images, the last of them called green, in batches of two: losses right, right and wrong."""
    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = 255
    found = clean_metrics(Brightest(), images, torch.tensor([0, 0, 0, 0, 1]), batch_size=2)
    right, wrong = math.log(math.exp(4) + 2) - 4, math.log(math.exp(4) + 2)
    assert (found["test_correct"], found["test_total"], found["test_acc"]) == (4, 5, 0.8)
    assert found["test_loss_sum_over_batch"] == pytest.approx(2 * right + wrong, rel=1e-5)
    assert found["test_loss_avg_over_batch"] == pytest.approx((2 * right + wrong) / 3, rel=1e-5)


def test_each_dataset_is_trained_by_its_own_recipe() -> None:
    normalised, bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(3, 4, 3))
    for name, values in {**RECIPES, "my folder": FOLDER_RECIPE}.items():
        assert recipe(name, normalised) == values
        assert recipe(name, bare) == {**values, "lr": 0.01}  # without batch norm more would diverge
    assert len({tuple(values.values()) for values in RECIPES.values()}) >= 4


def test_a_record_follows_the_recipe_of_its_dataset_where_no_flag_says_otherwise(tmp_path: Path) -> None:
    write_cifar10(tmp_path, random_pixels(60), [number % 10 for number in range(60)])
    places = {"dataset_path": str(tmp_path), "record_root": str(tmp_path / "record")}
    record = RecordSettings(dataset="CIFAR-10", model="preactresnet18", **places)
    found = make_plan(record, AttackSettings(), {"epochs": 3}).training
    assert (found.epochs, found.batch_size, found.lr) == (3, 128, 0.1)


def test_the_seed_of_a_record_draws_its_poisoned_images(tmp_path: Path) -> None:
    write_cifar10(tmp_path, random_pixels(60), [number % 10 for number in range(60)])
    places = {"dataset_path": str(tmp_path), "record_root": str(tmp_path / "record")}
    record = RecordSettings(dataset="cifar10", model="preactresnet18", limit_train=40, **places)
    plans = [make_plan(record, AttackSettings(pratio=0.5), {"random_seed": seed}) for seed in (0, 0, 1)]
    one, same, other = [(list(plan.used), plan.poison and plan.poison.train.indices) for plan in plans]
    assert one == same and one[0] != other[0] and one[1] != other[1]
