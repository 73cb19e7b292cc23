"""Cached scores and verdicts answer only the question they were computed for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.data.datasets import dataset_facts
from fmp_core.frg.scores import Scores
from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.build import PixelModel
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.selection.cache import (
    cache_file,
    load_scores,
    load_verdicts,
    save_scores,
    save_verdicts,
    score_key,
    verdict_file,
    verdict_key,
)
from fmp_core.storage.checkpoint import content_key
from torch import nn

LAYERS = (ConvLayer("c", nn.Conv2d(1, 4, 1)),)
QUESTION = {"eps": 0.1, "seed": 0}


def key(**changes: object) -> str:
    state = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    images, labels = torch.zeros(1, 1, 2, 2), torch.tensor([1])
    given = {"state": state, "images": images, "labels": labels, "settings": QUESTION} | changes
    return content_key(given["state"], given["images"], given["labels"], given["settings"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"state": {"w": torch.ones(2), "n": torch.tensor(3)}},
        {"images": torch.full((1, 1, 2, 2), 1e-7)},
        {"labels": torch.tensor([2])},
        {"settings": {"eps": 0.1, "seed": 1}},
    ],
    ids=["weights", "images", "labels", "settings"],
)
def test_another_question_has_another_key(changes: dict[str, object]):
    assert key() == key()
    assert key(**changes) != key()


def test_another_normalisation_is_another_question() -> None:
    """``--mean`` and ``--std`` are in the model, and not in its state_dict."""
    keys, images, labels = set(), torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64)
    for mean, std in ((0.5, 0.2), (0.5, 0.1), (0.4, 0.2)):
        model = PixelModel(nn.Conv2d(3, 2, 1), dataset_facts("cifar10", (2, 2, 3), [mean], [std]))
        model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
        keys.add(score_key(model, images, labels, {}))
        keys.add(verdict_key(TriggerSearch(model, LAYERS, images, labels, torch.float32, 0), 2))
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("torch.get_num_threads", lambda: 64),
        ("torch.backends.cpu.get_cpu_capability", lambda: "another"),
        ("fmp_core.system.devices.has_amx", lambda: None),
        ("fmp_core.system.devices.has_fast_bfloat16", lambda device: None),
    ],
)
def test_other_kernels_are_another_question(what: str, other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """A ranking that is killed on one node of a cluster and goes on on another would mix their roundings."""
    images, labels = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    model = PixelModel(nn.Conv2d(3, 2, 1), dataset_facts("cifar10", (2, 2, 3), None, None))
    search = TriggerSearch(model, LAYERS, images, labels, torch.float32, 0)
    before = score_key(model, images, labels, {}), verdict_key(search, 2)
    monkeypatch.setattr(what, other)
    after = score_key(model, images, labels, {}), verdict_key(search, 2)
    assert after[0] != before[0] and after[1] != before[1]


def test_scores_come_back(tmp_path: Path):
    settled = torch.tensor([True, True, False, True])
    margin, smallest_margin = torch.rand(2, 4).double()
    scores = Scores(LAYERS, torch.arange(4), margin, smallest_margin, 5, settled)
    save_scores(tmp_path, key(), scores)
    again = load_scores(tmp_path, key(), LAYERS)
    assert again is not None and again.samples == 5
    for name in ("correct", "margin", "smallest_margin", "settled"):
        assert torch.equal(getattr(again, name), getattr(scores, name))


def test_a_damaged_or_foreign_file_is_no_answer(tmp_path: Path):
    margin = torch.zeros(4).double()
    scores = Scores(LAYERS, torch.zeros(4, dtype=torch.int64), margin, margin, 5)
    assert load_scores(tmp_path, key(), LAYERS) is None
    save_scores(tmp_path, key(), scores)
    path = cache_file(tmp_path, key())
    path.write_bytes(path.read_bytes()[:200])
    assert load_scores(tmp_path, key(), LAYERS) is None
    save_scores(tmp_path, key(), scores)
    assert load_scores(tmp_path, key(), (*LAYERS, *LAYERS)) is None
    path.rename(cache_file(tmp_path, "other" + key()))
    assert load_scores(tmp_path, "other" + key(), LAYERS) is None


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
