"""The search for triggers finds planted backdoors, and nothing where there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fmp_core.inversion import search, trigger
from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.trigger import (
    ALL_TO_ALL,
    Batch,
    InvertedTrigger,
    invert_trigger,
)
from fmp_core.inversion.verdict import LEAST_MARGIN
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.selection.choice import Selection
from planted import (
    BAD,
    CLASSES,
    TARGET,
    WHITE,
    Planted,
    PlantedAllToAll,
    PlantedWarp,
    a_trigger,
    edges,
    images_of,
    trigger_search,
)
from torch import Tensor, nn
from toy import Plain
from toy_cases import footprint, toy_case


def test_a_planted_patch_is_found_and_its_map_changed_most():
    found = trigger_search(WHITE)
    before = footprint(found.model)
    verdict = found.test("sparse", CLASSES)
    assert verdict.backdoored and verdict.target == TARGET and verdict.flip_rates[TARGET] > 0.9
    trigger = found.triggers(["sparse"], TARGET)[0]
    assert found.activation_change(trigger).argmax() == BAD
    assert footprint(found.model) == before


@pytest.mark.parametrize("family", ["sparse", "warp-1"])
def test_a_clean_model_shows_nothing(family: str):
    verdict = trigger_search(None).test(family, CLASSES)
    assert not verdict.backdoored


class Biased(nn.Module):
    """A clean model that takes images of two classes for :data:`TARGET`."""

    def __init__(self) -> None:
        super().__init__()
        self.clean = Planted(None)
        self.conv = self.clean.conv

    def forward(self, x: Tensor) -> Tensor:
        logits = 10 * self.clean(x)
        biased = torch.full_like(logits, -1000)
        biased[:, 0], biased[:, TARGET] = logits[:, 0], logits[:, 1:].amax(1)
        return biased


def test_predictions_that_need_no_trigger_are_not_flipped():
    images, labels = images_of()
    model = Biased()
    without = model(images / 255).argmax(1)[labels != TARGET] == TARGET
    assert without.double().mean() > 0.6
    found = TriggerSearch(model, [ConvLayer("conv", model.conv)], images, labels, torch.float32, seed=0)
    for family in ("dense-4", "sparse"):
        verdict = found.test(family, CLASSES)
        assert not verdict.backdoored and verdict.flip_rates[TARGET] < 0.4


def test_all_to_all_is_a_target_of_its_own():
    images, labels = images_of()
    model = PlantedAllToAll(WHITE)
    found = TriggerSearch(model, [ConvLayer("conv", model.conv)], images, labels, torch.float32, seed=0)
    verdict = found.test("sparse", CLASSES)
    assert verdict.backdoored and verdict.target == ALL_TO_ALL and verdict.flip_rates[-1] > 0.9
    assert verdict.as_dict()["target"] == "all-to-all" and len(verdict.as_dict()["success"]) == CLASSES
    assert Selection(torch.zeros(8, dtype=torch.bool), verdict=verdict).target is None  # the teacher leaves no class out
    trigger = found.triggers(["sparse"], ALL_TO_ALL)[0]
    assert found.activation_change(trigger).argmax() == BAD
    assert trigger_search(WHITE).test("sparse", CLASSES).flip_rates[-1] < 0.5  # all go to one class


def test_a_planted_warp_is_found_by_its_family_alone():
    images, labels = edges(400)
    model = PlantedWarp()
    assert (model(images / 255).argmax(1) == labels).all()
    conv = nn.Conv2d(3, 1, 1)  # a search names a convolution, and this model has none
    found = TriggerSearch(model, [ConvLayer("conv", conv)], images, labels, torch.float32, seed=0)
    verdict = found.test("warp-1", 3)
    assert verdict.backdoored and verdict.target == 2 and verdict.flip_rates[2] > 0.9
    assert not found.test("dense-4", 3).backdoored


def test_of_many_classes_only_those_ahead_get_a_whole_trigger(monkeypatch: pytest.MonkeyPatch):
    """Of four classes one gets it, the planted one, with the flip rate of a search that gives it to all."""
    found, told = trigger_search(WHITE), []
    whole = found.test("sparse", CLASSES)
    inverted: list[tuple[int, bool]] = []

    def noted(network: nn.Module, dtype: torch.dtype, clean: Batch, family: str, target: int, seed: int, quick: bool):
        inverted.append((target, quick))
        return invert_trigger(network, dtype, clean, family, target, seed, quick)

    monkeypatch.setattr(search, "invert_trigger", noted)
    monkeypatch.setattr(search, "FINALISTS", 1)
    verdict = found.test("sparse", CLASSES, lambda: told.append(1))
    assert inverted == [*((target, True) for target in range(CLASSES)), (TARGET, False), (ALL_TO_ALL, False)]
    assert verdict.flip_rates[TARGET] == whole.flip_rates[TARGET] and verdict.backdoored
    assert len(told) == search.inversions(CLASSES) == CLASSES + 2


@pytest.mark.parametrize("nearest", range(1, 5))
def test_of_triggers_that_flip_nothing_those_nearest_to_it_are_ahead(nearest: int, monkeypatch: pytest.MonkeyPatch):
    """A flip rate of 0 is common among quick triggers; which number a class has must not decide."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3 * 64, 5))
    with torch.no_grad():
        for values in network.parameters():
            values.zero_()
        network[0].weight[:, :, 0, 0] = torch.eye(3)
        network[2].weight[nearest] = 0.1  # a brighter image is more probably of this class
        network[2].bias[0] = 50.0
    images = torch.full((40, 3, 8, 8), 100, dtype=torch.uint8)
    found = TriggerSearch(network, [ConvLayer("0", network[0])], images, torch.zeros(40, dtype=torch.int64), torch.float32, 0)
    whole: list[int] = []

    def noted(*args: Any) -> InvertedTrigger:
        whole.extend([args[4]] if not args[6] else [])
        return invert_trigger(*args)

    monkeypatch.setattr(search, "invert_trigger", noted)
    monkeypatch.setattr(search, "FINALISTS", 1)
    assert not found.test("dense-8", 5).flip_rates[1:5].any() and whole == [nearest, ALL_TO_ALL]


@pytest.mark.parametrize(("count", "held_out"), [(8, 3), (60, 22)])
def test_a_handful_of_images_shows_nothing(count: int, held_out: int):
    """Half of them are held out; of few a class is easily ahead by chance, backdoor or not."""
    found = trigger_search(WHITE)
    few = TriggerSearch(found.model, found.layers, found.images[:count], found.labels[:count], torch.float32, 0)
    verdict = few.test("sparse", CLASSES)
    assert verdict.margin >= LEAST_MARGIN and verdict.too_few and not verdict.backdoored
    assert verdict.held_out == held_out  # half of them, but for the largest class


def test_a_subset_of_one_class_only_shows_nothing():
    found = trigger_search(WHITE)
    one = found.labels == TARGET
    alone = TriggerSearch(found.model, found.layers, found.images[one], found.labels[one], torch.float32, 0)
    verdict = alone.test("sparse", CLASSES)
    assert float(verdict.flip_rates[TARGET]) == 0 and verdict.too_few


def test_no_trigger_is_inverted_on_images_of_its_target(monkeypatch: pytest.MonkeyPatch):
    """Other images of the target class change nothing, other images of another class do."""
    monkeypatch.setattr(trigger, "STEPS", 4)
    model, images, labels = toy_case(Plain, count=40)
    pixels, seen = (images * 255).to(torch.uint8), torch.arange(40) < 20
    target, other = labels[:20].bincount().topk(2).indices.tolist()

    def inverted(changed: int | None) -> list[Tensor]:
        rows = (seen & (labels == changed)) if changed is not None else torch.zeros(40, dtype=torch.bool)
        shown = torch.where(rows[:, None, None, None], 255 - pixels, pixels)
        found = TriggerSearch(model, [ConvLayer("conv1", model.network.conv1)], shown, labels, torch.float32, seed=0)
        return [found.triggers(["dense-8"], towards)[0].values for towards in (target, ALL_TO_ALL)]

    plain, of_target, of_other = inverted(None), inverted(target), inverted(other)
    assert torch.equal(plain[0], of_target[0]) and not torch.equal(plain[0], of_other[0])
    assert not torch.equal(plain[1], of_target[1])  # of all-to-all, every class is another one's


def test_the_activation_change_is_the_mean_over_all_held_out_images():
    found, patch = trigger_search(WHITE), a_trigger("sparse", 1.0)
    clean = found.images[-200:] / 255
    with torch.no_grad():
        change = (found.model.conv(patch.apply(clean)) - found.model.conv(clean)).abs().double().mean((2, 3))
    assert change.std(0).min() > 0
    torch.testing.assert_close(found.activation_change(patch), change.mean(0), rtol=1e-4, atol=1e-8)


def test_at_most_256_images_are_held_out():
    images, labels = images_of(600)
    found = replace(trigger_search(None), images=images, labels=labels)
    assert torch.equal(found.held_out[0], images[-256:]) and torch.equal(found.held_out[1], labels[-256:])
