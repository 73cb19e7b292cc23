"""Records of version 1 of BackdoorBench: images in memory, in whatever range and layout."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.data.attack_record import PoisonedSet, read_attack_record
from fmp_core.data.datasets import FACTS, Split
from fmp_core.errors import UserError
from PIL import Image
from small_record import AT, PIXELS, SIZE, TRUE, Edit, clean_test, images_in, set_to


def v1(x: Any, **more: Any) -> Callable[[dict[str, Any]], None]:
    return set_to("bd_test", value={"x": x, "y": [0] * 4, **more})


def pil_images() -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]


X = {
    "float tensor": lambda: PIXELS.float() / 255,
    "between grey levels": lambda: (PIXELS.float() - 0.3).clamp(min=0) / 255,
    "PIL images": pil_images,
    "arrays": lambda: [image.permute(1, 2, 0).numpy() for image in PIXELS],
}


@pytest.mark.parametrize("x", X.values(), ids=X.keys())
def test_v1_images_are_read(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    found = read_attack_record(record).bd_test
    assert torch.equal(found.pixels(SIZE), PIXELS)
    assert found.targets.tolist() == [0] * 4 and found.true_labels(clean_test()).tolist() == TRUE


def test_v1_labels_may_be_tensors_or_arrays(record: Path, edit_record: Edit):
    x = PIXELS.float() / 255
    edit_record(record, set_to("bd_test", value={"x": x, "y": torch.zeros(4), "original_targets": np.array(TRUE)}))
    found = read_attack_record(record).bd_test
    assert found.targets.dtype == torch.int64 and found.true_labels(clean_test()).tolist() == TRUE


def test_v1_true_labels_come_from_the_indices(record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), original_index=np.array(AT)))
    assert read_attack_record(record).bd_test.true_labels(clean_test()).tolist() == TRUE


def test_true_labels_of_the_whole_test_set_are_read_at_the_indices(record: Path, edit_record: Edit):
    """BB's WaNet of March 2022 saved them so, and its defenses of then read them so."""
    whole = [7] * (max(AT) + 1)
    for place, label in zip(AT, TRUE, strict=True):
        whole[place] = label
    edit_record(record, v1(pil_images(), original_index=AT, original_targets=whole))
    assert read_attack_record(record).bd_test.original.tolist() == TRUE
    edit_record(record, v1(pil_images(), original_index=[*AT[:3], 99], original_targets=whole))
    with pytest.raises(UserError, match="original_targets has 3 entries for 4 images"):
        read_attack_record(record)


@pytest.mark.parametrize("key", [("model",), ("img_size",), ("bd_test", "poison_indicator")])
def test_an_unknown_object_where_data_is_needed_is_named(key: tuple[str, ...], record: Path, edit_record: Edit):
    edit_record(record, set_to(*key, value=argparse.Namespace(x=1)))
    with pytest.raises(UserError, match=rf"{' '.join(key)} is a argparse\.Namespace"):
        read_attack_record(record)


def test_a_test_set_in_another_order_is_refused(record: Path):
    """RA would still be right, but pairs of clean and poisoned images would show different things."""
    poisoned, test = read_attack_record(record).bd_test, clean_test()
    shuffled = Split(test.labels.flip(0), test.read)
    with pytest.raises(UserError, match="of its 4 poisoned test images, only 0 are those of the clean test images"):
        poisoned.true_labels(shuffled)


def test_a_few_labels_may_differ_from_the_clean_test_set(tmp_path: Path):
    labels = torch.arange(100) % 7
    poisoned = PoisonedSet(torch.zeros(100, 3, 1, 1), torch.zeros(100).long(), labels, torch.arange(100))
    other = labels.clone()
    other[:5] += 1
    assert torch.equal(poisoned.true_labels(Split(other, lambda rows: torch.zeros(0))), labels)
    other[5] += 1
    with pytest.raises(UserError, match="another order"):
        poisoned.true_labels(Split(other, lambda rows: torch.zeros(0)))


def test_a_dataset_may_have_a_blank_in_its_name(record: Path, edit_record: Edit):
    edit_record(record, set_to("clean_data", value="my toys"))
    assert read_attack_record(record).dataset == "my toys"


def test_v1_without_true_labels_is_refused(record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images()))
    found = read_attack_record(record).bd_test
    with pytest.raises(UserError, match="RA is undefined"):
        found.true_labels(clean_test())


@pytest.mark.parametrize(
    "index",
    [8, 999, -1],
)
def test_a_v1_index_outside_the_test_set_is_refused(index: int, record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), original_index=[1, 4, 6, index]))
    with pytest.raises(UserError):
        read_attack_record(record).bd_test.true_labels(clean_test())


@pytest.mark.parametrize(
    "more",
    [
        {"original_targets": TRUE[:3]},
        {"original_index": AT[:3]},
        {"y": [0] * 3, "original_targets": TRUE},
        {"y": [0] * 5, "original_targets": TRUE},
    ],
    ids=["true labels", "indices", "fewer targets", "more targets"],
)
def test_v1_labels_must_be_as_many_as_images(more: dict[str, Any], record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), **more))
    with pytest.raises(UserError):
        read_attack_record(record).bd_test.true_labels(clean_test())


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 3, 4, 4),
        torch.zeros(4, 3, 8, 8),
        torch.zeros(4, 1, 4, 4),
        torch.zeros(4),
        None,
        7,
        [],
    ],
    ids=["three", "large", "grey", "flat", "none", "number", "empty"],
)
def test_v1_images_that_do_not_fit_are_refused(x: Any, record: Path, edit_record: Edit):
    edit_record(record, v1(x, original_targets=TRUE))
    with pytest.raises(UserError, match="not as BackdoorBench writes it"):
        read_attack_record(record)


def test_v1_floats_in_the_unit_interval_are_pixels(record: Path, edit_record: Edit):
    edit_record(record, v1([np.full((4, 4, 3), 0.2, np.float32)] * 4, original_targets=TRUE))
    assert read_attack_record(record).bd_test.pixels((4, 4, 3)).unique().tolist() == [51]


def normalised(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return (pixels.float() / 255 - mean) / std


MNIST_PIXELS = PIXELS[:, :1]
RANGES: dict[str, Callable[[], Any]] = {
    "bytes, channels first": lambda: PIXELS,
    "bytes, channels last": lambda: PIXELS.permute(0, 2, 3, 1),
    "whole floats": lambda: PIXELS.float(),
    "floats of bytes, channels last": lambda: PIXELS.permute(0, 2, 3, 1).numpy().astype(np.float64),
    "long integers": lambda: PIXELS.long(),
    "a list of tensors": lambda: list(PIXELS),
    "a list of float tensors": lambda: [image / 255 for image in PIXELS],
    "a list of tensors, channels last": lambda: [image.permute(1, 2, 0) for image in PIXELS],
    "a list of arrays, channels first": lambda: [image.numpy() for image in PIXELS],
}


@pytest.mark.parametrize("x", RANGES.values(), ids=RANGES.keys())
def test_the_range_and_layout_of_v1_images_are_found(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    assert torch.equal(images_in(record), PIXELS)


def test_normalised_v1_images_are_recognised_by_the_datasets_mean_and_std(record: Path, edit_record: Edit):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (FACTS["cifar10"].mean, FACTS["cifar10"].std))
    edit_record(record, v1((PIXELS.float() / 255 - mean) / std, original_targets=TRUE))
    edit_record(record, set_to("clean_data", value="CIFAR-10"))
    assert torch.equal(images_in(record), PIXELS)


def test_images_normalised_otherwise_are_recognised_by_the_mean_and_std_given(record: Path, edit_record: Edit):
    edit_record(record, v1(normalised(PIXELS, 0.5, 0.25), original_targets=TRUE))
    with pytest.raises(UserError, match="--mean and --std name others"):
        read_attack_record(record)
    assert torch.equal(read_attack_record(record, (0.5,), (0.25,)).bd_test.images, PIXELS)
    edit_record(record, v1(PIXELS, original_targets=TRUE))
    assert torch.equal(read_attack_record(record, (0.5,), (0.25,)).bd_test.images, PIXELS)


UNCERTAIN: dict[str, Callable[[], Any]] = {
    "normalised otherwise": lambda: normalised(PIXELS, 0.5, 0.5),
    "above one": lambda: PIXELS.float() / 100,
    "above 255": lambda: PIXELS.long() + 10,
    "below zero": lambda: PIXELS.long() - 1,
    "floats beside bytes": lambda: [PIXELS[0], *(PIXELS[1:].float() / 255)],
}


@pytest.mark.parametrize("x", UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_v1_images_of_an_uncertain_range_are_refused_and_never_clipped(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    with pytest.raises(UserError, match="bd_test x holds"):
        read_attack_record(record)
