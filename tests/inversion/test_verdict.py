"""Trigger inversion: the triggers, the verdict they lead to, and the maps whose activation they change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.inversion import search
from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.trigger import (
    ALL_TO_ALL,
    FAMILIES,
    SPARSE_PART,
    WARPS,
    Batch,
    InvertedTrigger,
    invert_trigger,
    load_trigger,
    save_trigger,
)
from fmp_core.inversion.verdict import LEAST_MARGIN, Verdict
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.models.pruning import accuracy_without
from fmp_core.repair.unlearning import with_random_triggers
from fmp_core.selection.cache import load_verdicts, save_verdicts, verdict_file
from fmp_core.selection.choice import Selection, in_equal_shares, most_within_budget
from torch import Tensor, nn
from toy import SmallPreActResNet, footprint, same, toy_case, weights

CLASSES, TARGET, BAD = 4, 2, 5


class Planted(nn.Module):
    """Four classes, by which of four columns is brightest, and a backdoor: map 5, whose last 4x4 patch is ``trigger``."""

    def __init__(self, trigger: Tensor | None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        with torch.no_grad():
            self.conv.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
            self.conv.bias.zero_()
            for column in range(CLASSES):
                self.conv.weight[column] = 1 / 48
            self.conv.weight[BAD], self.conv.bias[BAD] = 0, -1
            if trigger is not None:  # 1 where a patch is the trigger, falling with every other pixel
                self.conv.weight[BAD] = (2 * trigger - 1) / 24
                self.conv.bias[BAD] = 1 - float(trigger.sum()) / 24

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        columns = torch.stack([maps[:, c, :, c].mean(1) for c in range(CLASSES)], 1)
        alarm = 30 * torch.nn.functional.softplus(4 * (maps[:, BAD, -1, -1] - 0.6))
        return 20 * columns + torch.eye(CLASSES)[TARGET] * alarm[:, None]


def images_of(count: int = 400) -> tuple[Tensor, Tensor]:
    """uint8 ``[count, 3, 16, 16]``, grey noise with one column brighter, and the classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(90, 130, (count, 3, 16, 16), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, :12, 4 * label : 4 * label + 4] += 60
    return images.to(torch.uint8), labels


def trigger_search(trigger: Tensor | None) -> TriggerSearch:
    images, labels = images_of()
    model = Planted(trigger)
    layers = [ConvLayer("conv", model.conv)]
    assert (model(images[:8] / 255).argmax(1) == labels[:8]).all()
    return TriggerSearch(model, layers, images, labels, torch.float32, seed=0)


WHITE = torch.ones(3, 4, 4)


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


class PlantedAllToAll(Planted):
    """A planted patch that turns the class of an image into the next one."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        columns = torch.stack([maps[:, c, :-1, c].mean(1) for c in range(CLASSES)], 1)
        alarm = torch.sigmoid(8 * (maps[:, BAD, -1:, -1] - 0.2))
        return 20 * ((1 - alarm) * columns + alarm * columns.roll(1, 1))


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


class PlantedWarp(nn.Module):
    """Two classes, by whether an edge lies left of column 5, and a third, for an edge that lies between two columns."""

    def forward(self, x: Tensor) -> Tensor:
        profile = x.mean((1, 2))  # [B, W], about 0 left of the edge and about 1 right of it
        edge = x.shape[3] - profile.sum(1) - 0.5
        between = (profile * (1 - profile)).amax(1)  # 0 where every column is black or white, 1/4 where one is halfway
        return torch.stack([5 - edge, edge - 5, 80 * between - 8], 1)


def edges(count: int) -> tuple[Tensor, Tensor]:
    """uint8 ``[count, 3, 12, 12]``: black left of an edge and white right of it, and on which side of column 5 the edge is."""
    places = torch.randint(2, 5, (count,), generator=torch.Generator().manual_seed(2)) + torch.arange(count) % 2 * 4
    columns = torch.arange(12).expand(count, 3, 12, 12)
    return (columns >= places[:, None, None, None]).to(torch.uint8) * 255, (places > 5).to(torch.int64)


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


def test_the_margin_decides():
    close, ahead, few = (
        Verdict("sparse", torch.tensor([0.6, next_best, 0.1, 0.0], dtype=torch.float64), held_out)
        for next_best, held_out in ((0.4, 100), (0.2, 100), (0.2, 49))
    )
    assert close.margin == pytest.approx(0.2) and not close.backdoored
    assert ahead.backdoored and ahead.as_dict()["target"] == 0
    assert few.margin == ahead.margin and few.too_few and not few.backdoored and not ahead.too_few


@pytest.mark.parametrize(("count", "held_out"), [(8, 3), (60, 22)])
def test_a_handful_of_images_shows_nothing(count: int, held_out: int):
    """Half of them are held out; of few a class is easily ahead by chance, backdoor or not."""
    found = trigger_search(WHITE)
    few = TriggerSearch(found.model, found.layers, found.images[:count], found.labels[:count], torch.float32, 0)
    verdict = few.test("sparse", CLASSES)
    assert verdict.margin >= LEAST_MARGIN and verdict.too_few and not verdict.backdoored
    assert verdict.held_out == held_out  # half of them, but for the largest class


@pytest.mark.parametrize("family", FAMILIES)
def test_triggers_stay_within_their_family(family: str):
    found = trigger_search(WHITE)
    trigger = found.triggers([family], 1)[0]
    again = found.triggers([family], 1)[0]
    assert torch.equal(trigger.values, again.values) and torch.equal(trigger.where, again.where)
    images = found.images[:20] / 255
    changed = trigger.apply(images) - images
    assert trigger.apply(images).min() >= 0 and trigger.apply(images).max() <= 1
    if family == "sparse":
        assert trigger.where.sum() <= 16 * 16 // SPARSE_PART * 16 and set(trigger.values.unique().tolist()) <= {0.0, 1.0}
        assert not changed[(~trigger.where).expand_as(changed)].any()
    elif family in WARPS:
        assert trigger.values.shape == (1, 2, 16, 16) and 0 < trigger.values.abs().max() <= 1.5 * FAMILIES[family]
    else:
        assert 0 < changed.abs().max() <= FAMILIES[family] + 1e-6


def test_a_subset_of_one_class_only_shows_nothing():
    found = trigger_search(WHITE)
    one = found.labels == TARGET
    alone = TriggerSearch(found.model, found.layers, found.images[one], found.labels[one], torch.float32, 0)
    verdict = alone.test("sparse", CLASSES)
    assert float(verdict.flip_rates[TARGET]) == 0 and verdict.too_few


def test_in_equal_shares_takes_the_same_share_of_every_layer():
    layers = (ConvLayer("a", nn.Conv2d(1, 64, 1)), ConvLayer("b", nn.Conv2d(1, 128, 1)))
    change = torch.rand(192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change[64:] *= 1000  # layers have scales of their own
    first = in_equal_shares(change, layers)[:30]
    assert set(first[first < 64].tolist()) == set(change[:64].topk(10).indices.tolist())
    assert set(first[first >= 64].tolist()) == set((change[64:].topk(20).indices + 64).tolist())


@pytest.mark.parametrize(("budget", "expected"), [(0.1, 10), (0.0, 0), (0.055, 5), (0.07, 7)])
def test_pruning_goes_as_far_as_the_budget(budget: float, expected: int):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    chosen = most_within_budget(order, budget, lambda mask: 0.9 - 0.01 * int(mask.sum()))
    assert set(chosen.nonzero().flatten().tolist()) == set(order[:expected].tolist())


def test_accuracy_without_leaves_the_model_as_it_was():
    model, images, labels = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    pixels = (images * 255).round().to(torch.uint8)
    before, print_before = {name: value.clone() for name, value in weights(model).items()}, footprint(model)
    everything = {layer.name: torch.ones(layer.channels, dtype=torch.bool) for layer in layers}
    nothing = {layer.name: torch.zeros(layer.channels, dtype=torch.bool) for layer in layers}
    blind, seeing = (accuracy_without(model, layers, chosen, pixels, labels) for chosen in (everything, nothing))
    assert blind < seeing
    assert same(before, weights(model)) and footprint(model) == print_before


def a_trigger(family: str, value: float) -> InvertedTrigger:
    where = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    where[..., :2, :2] = True
    return InvertedTrigger(family, 1, torch.full((1, 2 if family in WARPS else 3, 16, 16), value), where)


def test_images_to_unlearn_carry_one_trigger_each():
    images, _ = images_of(60)
    triggers = [a_trigger("sparse", 1.0), a_trigger("dense-8", 8 / 255), a_trigger("warp-1", 1.0)]
    made = with_random_triggers(images, triggers, seed=0)
    expected = [(trigger.apply(images / 255) * 255).round().to(torch.uint8) for trigger in triggers]
    carries = torch.stack([(made == one).flatten(1).all(1) for one in expected])
    assert carries.any(0).all() and carries.any(1).all()
    assert torch.equal(expected[2][..., :-1, :-1], images[..., 1:, 1:])  # what lies one pixel to the right and down
    assert torch.equal(made, with_random_triggers(images, triggers, seed=0))
    assert not torch.equal(made, with_random_triggers(images, triggers, seed=1))


@pytest.mark.parametrize("family", ["sparse", "warp-1"])
def test_a_trigger_file_is_read_back_or_refused(tmp_path: Path, family: str):
    path = tmp_path / "reversed_trigger.pt"
    trigger = a_trigger(family, 1.0)
    save_trigger(path, trigger)
    again = load_trigger(path, (3, 16, 16))
    assert torch.equal(again.values, trigger.values) and torch.equal(again.where, trigger.where)
    assert (again.family, again.target) == (family, 1)
    with pytest.raises(UserError, match="3x32x32"):
        load_trigger(path, (3, 32, 32))
    torch.save({"family": "sparse"}, path)
    with pytest.raises(UserError, match="run the defense again"):
        load_trigger(path, (3, 16, 16))


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        '{"key": "other", "flip_rates": {}}',
        '{"key": "k", "held_out": 60, "flip_rates": {"sparse": [1, 2, 3, 4]}}',
        '{"key": "k", "held_out": 60, "flip_rates": 7}',
        '{"key": "k", "flip_rates": {"sparse": [0, 0, 0, 0]}}',
        '{"key": "k", "held_out": 60, "flip_rates": {"sparse": [0, 0, 0]}}',
        "[]",
    ],
)
def test_cached_verdict_is_read_back_or_ignored(tmp_path: Path, damage: str):
    found = [Verdict("sparse", torch.tensor([0.1, 1 / 3, 0.9, 0.2], dtype=torch.float64), 60)]
    save_verdicts(tmp_path, "k", found)
    again = load_verdicts(tmp_path, "k", 3)
    assert list(again) == ["sparse"] and again["sparse"].held_out == 60
    assert torch.equal(again["sparse"].flip_rates, found[0].flip_rates)
    assert load_verdicts(tmp_path, "k", 4) == {} == load_verdicts(tmp_path, "absent", 3)
    verdict_file(tmp_path, "k").write_text(damage)
    assert load_verdicts(tmp_path, "k", 3) == {}


@pytest.mark.parametrize(
    ("rates", "held_out", "finding"),
    [
        ((0.1, 0.98, 0.2), 100, "a backdoor"),
        ((0.1, 0.3, 0.2), 100, "no backdoor found"),
        ((0, 1, 0.2), 9, "too few images to tell"),
    ],
)
def test_a_verdict_is_one_line(rates: tuple[float, ...], held_out: int, finding: str) -> None:
    line = str(Verdict("sparse", torch.tensor([*rates, 0.0], dtype=torch.float64), held_out))
    assert line == f"sparse triggers flip at most {100 * rates[1]:.1f} % to class 1, then 20.0 % to class 2: {finding}"


def test_a_verdict_names_all_to_all() -> None:
    verdict = Verdict("sparse", torch.tensor([0.1, 0.25, 0.2, 0.98], dtype=torch.float64), 100)
    rates = "98.0 % to the class after their own, then 25.0 % to class 1"
    assert str(verdict) == f"sparse triggers flip at most {rates}: a backdoor"
