"""Selecting feature maps: which selection prunes what, what is read from the cache, and which images decide."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fmp_core.data import clean_subset
from fmp_core.frg import racing, reverse
from fmp_core.frg.scores import layer_slices
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import search, trigger, verdict, warp
from fmp_core.models import preact_resnet
from fmp_core.selection import cache, select
from fmp_core.selection.choice import Selection
from fmp_core.selection.select import select_feature_maps
from fmp_core.settings import Settings
from fmp_core.system import devices
from fmp_core.system.cli import Stages
from fmp_core.system.versions import source_digest


def pruned_by_layer(selection: Selection, defender: DefenderInputs) -> list[int]:
    return [int(selection.mask[positions].sum()) for _, positions in layer_slices(defender.layers)]


@pytest.mark.parametrize("selection, stages", [("frg", ["ranking"]), ("trigger", ["trigger inversion", "ranking"])])
def test_stages_that_a_cache_answers_are_noted(
    selection: str, stages: list[str], defender: DefenderInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", 2.0)  # no backdoor is found, so that the maps are ranked, too
    settings = Settings(frg_samples=2, p=2, selection=selection)
    first, second = Stages(), Stages()
    for run in (first, second):
        select_feature_maps(defender, settings, tmp_path, run)
    assert first.reused == [] and second.reused == stages


@pytest.mark.parametrize("backdoored", [True, False])
def test_maps_are_drawn_at_random_only_if_that_is_asked_for(
    backdoored: bool, defender: DefenderInputs, selecting: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch
):
    """Not where scores, a verdict or triggers are missing: those are other selections, which have none of these."""
    drawn: list[object] = []
    genuine = select.select_at_random
    monkeypatch.setattr(select, "select_at_random", lambda *given: drawn.append(given) or genuine(*given))
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0 if backdoored else 2.0)
    selections = {name: selecting(selection=name) for name in ("frg", "trigger", "none")}
    assert drawn == []
    assert selections["none"].pruned == 0 and selections["none"].scores is None
    assert selections["frg"].scores is not None and selections["frg"].verdict is None
    assert (selections["trigger"].scores is None) == backdoored == bool(selections["trigger"].triggers)
    assert (selections["trigger"].activation_change is not None) == backdoored == (selections["trigger"].target is not None)
    if not backdoored:  # as in the paper
        assert torch.equal(selections["trigger"].mask, selections["frg"].mask)
    one, again, other = (selecting(selection="random", random_seed=seed) for seed in (0, 0, 1))
    assert len(drawn) == 3 and one.scores is None
    assert torch.equal(one.mask, again.mask) and not torch.equal(one.mask, other.mask)
    shares = [layer.channels // 2 for layer in defender.layers]
    assert pruned_by_layer(one, defender) == shares == pruned_by_layer(selections["frg"], defender)


def test_no_trigger_is_inverted_on_the_images_that_the_budget_is_measured_on(
    defender: DefenderInputs, selecting: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch
):
    inverted_on: list[torch.Tensor] = []
    measured_on: list[torch.Tensor] = []
    invert, accuracy = search.invert_trigger, select.accuracy_without

    def watched_inversion(network: Any, dtype: Any, clean: tuple[torch.Tensor, torch.Tensor], *more: Any) -> Any:
        inverted_on.extend(clean[0])
        return invert(network, dtype, clean, *more)

    def watched_accuracy(model: Any, layers: Any, masks: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
        measured_on.extend(images)
        assert len(labels) == len(images)
        return accuracy(model, layers, masks, images, labels)

    monkeypatch.setattr(search, "invert_trigger", watched_inversion)
    monkeypatch.setattr(select, "accuracy_without", watched_accuracy)
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)
    assert selecting(selection="trigger").triggers
    known = {image.numpy().tobytes() for image in inverted_on}
    assert measured_on and known and not known & {image.numpy().tobytes() for image in measured_on}
    assert len({image.numpy().tobytes() for image in measured_on}) == 12  # half of them are held out


# An algorithm's constants are part of the question that the cache answers.


def test_scores_of_another_algorithm_are_not_believed(
    selecting: Callable[..., Selection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def ranked() -> bool:
        caplog.clear()
        with caplog.at_level(logging.INFO, "fmp_core"):
            selecting()
        assert ("ranking" in caplog.text) != ("read from" in caplog.text)
        return "ranking" in caplog.text

    assert ranked() and not ranked()
    for module, constant in ((reverse, "clamp(0, 1)"), (racing, "CONTENDERS = 2"), (devices, "amx"), (preact_resnet, "F.relu")):
        with monkeypatch.context() as patch:
            change_source(module, constant, tmp_path / module.__name__, patch)
            patch.setattr(cache, "SCORES_CODE", source_digest(*cache.SCORES_MODULES))
            assert ranked(), module
    assert not ranked()  # and what was believed before still is


def test_verdicts_of_another_algorithm_are_not_believed(
    selecting: Callable[..., Selection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    searched: list[str] = []
    genuine = search.TriggerSearch.test

    def watched(self: search.TriggerSearch, family: str, *others: Any) -> verdict.Verdict:
        searched.append(family)
        return genuine(self, family, *others)

    monkeypatch.setattr(search.TriggerSearch, "test", watched)
    few = selecting(selection="trigger")
    assert searched == [] and few.verdict is not None and few.verdict.too_few  # to tell; so nothing is inverted
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    selecting(selection="trigger")
    assert searched == list(trigger.FAMILIES)
    searched.clear()
    selecting(selection="trigger")
    assert searched == []
    for module, constant in ((trigger, "STEPS = 16"), (warp, "CONTROL_POINTS = 4"), (clean_subset, "HELD_OUT = 256")):
        searched.clear()
        with monkeypatch.context() as patch:
            change_source(module, constant, tmp_path / module.__name__, patch)
            patch.setattr(cache, "VERDICT_CODE", source_digest(*cache.VERDICT_MODULES))
            selecting(selection="trigger")
        assert searched == list(trigger.FAMILIES), module


def change_source(module: ModuleType, line: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let ``module`` and its package lie in ``folder``, with something changed in ``line``; their code stays what it is."""
    package = sys.modules[module.__name__.rpartition(".")[0]]
    copy = Path(shutil.copytree(Path(str(package.__file__)).parent, folder))
    file = copy / Path(str(module.__file__)).name
    text = file.read_text()
    assert line in text
    file.write_text(text.replace(line, line[:-1] + "3"))
    patch.setattr(module, "__file__", str(file))
    patch.setattr(package, "__file__", str(copy / "__init__.py"))
