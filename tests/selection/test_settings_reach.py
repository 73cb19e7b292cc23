"""The settings of a run reach the selection: its seed, its images, its budget and its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import verdict
from fmp_core.inversion.trigger import FAMILIES
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.evaluate import to_unit
from fmp_core.models.pruning import accuracy_without
from fmp_core.selection import select
from fmp_core.selection.cache import save_verdicts, verdict_key
from fmp_core.selection.choice import Selection
from fmp_core.selection.select import score_or_load, select_by_trigger, trigger_search
from fmp_core.settings import Settings
from fmp_core.system.cli import Stages
from scoring import score_feature_maps
from toy import CLASSES

TARGET = 1


def backdoored(family: str) -> Verdict:
    """A verdict that names :data:`TARGET`."""
    return Verdict(family, torch.eye(CLASSES + 1, dtype=torch.float64)[TARGET], 100)


def by_trigger(defender: DefenderInputs, family: str = "dense-4", **settings: float) -> Selection:
    return select_by_trigger(defender, Settings(**settings), backdoored(family), Stages())  # type: ignore[arg-type]


def test_feature_maps_are_ranked_with_the_seed_of_the_run(
    defender: DefenderInputs, selecting: Callable[..., Selection]
) -> None:
    one, other = (selecting(eps=8 / 255, random_seed=seed).scores for seed in (0, 1))
    assert not torch.equal(one.margin, other.margin)
    images, labels = to_unit(defender.images[:2]), defender.labels[:2]
    expected = score_feature_maps(defender.model, defender.layers, images, labels, eps=8 / 255, seed=1)
    assert torch.equal(other.margin, expected.margin)


@pytest.mark.parametrize(("frg_samples", "count"), [("all", 48), (40, 40), (3, 3), (64, 48)])
def test_feature_maps_are_ranked_on_as_many_images_as_asked_for(
    frg_samples: int | str, count: int, defender: DefenderInputs, tmp_path: Path
) -> None:
    more = replace(defender, images=defender.images.repeat(2, 1, 1, 1), labels=defender.labels.repeat(2))
    scores = score_or_load(more, Settings(frg_samples=frg_samples), tmp_path, Stages())
    assert scores.samples == count == scores.correct.max()


def test_triggers_are_inverted_with_the_seed_of_the_run(defender: DefenderInputs) -> None:
    one, again, other = (by_trigger(defender, random_seed=seed).triggers[0].values for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "families"),
    [
        ("sparse", ["sparse", "dense-4", "dense-8", "dense-16", "dense-32"]),
        ("warp-1", ["warp-1", "dense-4", "sparse", "dense-8", "dense-16", "dense-32"]),
    ],
)
def test_triggers_of_the_other_families_come_with_the_verdicts(
    family: str, families: list[str], defender: DefenderInputs
) -> None:
    found = by_trigger(defender, family)
    assert [trigger.family for trigger in found.triggers] == families
    assert {trigger.target for trigger in found.triggers} == {TARGET} == {found.target}
    assert torch.equal(found.activation_change, trigger_search(defender, Settings()).activation_change(found.triggers[0]))


def test_pruning_costs_the_budget_of_the_run_and_no_more(defender: DefenderInputs) -> None:
    """All held-out images are right before; with all of the budget, pruning ends at a quarter of the 36 maps."""
    held_out = trigger_search(defender, Settings()).held_out
    budgets, pruned = (0.05, 0.5, 1.0), []
    for budget in budgets:
        selection = by_trigger(defender, budget=budget)
        chosen = selection.by_layer(defender.layers)
        assert accuracy_without(defender.model, defender.layers, chosen, *held_out) >= 1 - budget
        pruned.append(selection.pruned)
    assert pruned == sorted(pruned) and pruned[0] < pruned[-1] == 36 // 4 - 1


@pytest.mark.parametrize(
    ("margins", "family"),
    [([0.1, 0.25, 0.2, 0.0, 0.15, 0.05], "sparse"), ([0.1, 0.2, 0.4, 0.9, 0.0, 0.0], "dense-8")],
    ids=["no backdoor", "backdoor"],
)
def test_of_all_verdicts_the_first_backdoor_or_else_the_largest_margin_counts(
    margins: list[float], family: str, defender: DefenderInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    key, rates = verdict_key(trigger_search(defender, Settings()), CLASSES), torch.eye(CLASSES + 1, dtype=torch.float64)
    save_verdicts(
        tmp_path, key, [Verdict(name, margin * rates[2], 100) for name, margin in zip(FAMILIES, margins, strict=True)]
    )
    stages = Stages()
    found = select.test_for_backdoor(defender, Settings(), tmp_path, stages)
    assert stages.reused == ["trigger inversion"] and found.family == family and found.backdoored == (family == "dense-8")


def test_feature_maps_are_ranked_in_the_precision_of_the_run(
    defender: DefenderInputs, selecting: Callable[..., Selection]
) -> None:
    images, labels = to_unit(defender.images[:2]), defender.labels[:2]
    expected = score_feature_maps(defender.model, defender.layers, images, labels, eps=8 / 255, dtype=torch.bfloat16)
    assert torch.equal(selecting(dtype="bf16", eps=8 / 255).scores.margin, expected.margin)
    assert selecting(dtype="bf16", ranking="racing", p=8).scores.settled is None  # there is no race in bf16
