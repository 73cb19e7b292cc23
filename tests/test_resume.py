"""A ranking stopped after any group of maps, and begun again, has the bits of one that was not; other states are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.frg import racing, scorer_state
from fmp_core.frg import scorer as scorer_module
from fmp_core.frg.racing import race
from fmp_core.frg.scorer import FeatureMapScorer
from fmp_core.frg.scorer_state import RankingCheckpoints
from fmp_core.frg.scores import Counts, Scores
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.storage.checkpoint import Checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import make_scorer, score_feature_maps
from toy import Plain, SmallPreActResNet
from toy_cases import toy_case

EPS = 16 / 255
FIELDS = ("correct", "margin", "smallest_margin")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def stops_at(group: int, kind: type[BaseException]) -> Callable[[int], None]:
    left = [group]

    def progress(_pairs: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise kind

    return progress


def scorer(model_kind: type[torch.nn.Module], images_count: int = 7) -> Callable[..., Scores]:
    model, images, labels = toy_case(model_kind, count=images_count)
    layers = trace_conv_layers(model.network, images[:1])
    return lambda **options: score_feature_maps(model, layers, images, labels, eps=EPS, **options)


def equal(one: Scores, other: Scores) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("kind", [Killed, KeyboardInterrupt])
def test_stopped_after_each_group_a_ranking_ends_with_the_same_bits(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Seven images in batches of at most 3; each attempt comes one group further than the one before."""
    monkeypatch.setattr(scorer_state, "EVERY", 0.0 if kind is Killed else 1e9)
    score = scorer(Plain)
    told: list[int] = []
    expected = score(rows=3, progress=told.append)
    checkpoint = Checkpoint(tmp_path / "ranking.pt", {"key": "a"})
    stops = 0
    for attempt in range(1, len(told) + 2):
        try:
            found = score(rows=3, progress=stops_at(attempt, kind), checkpoint=checkpoint)
            break
        except kind:
            stops += 1
    assert stops > 3 and equal(found, expected)


def test_a_batch_that_was_halved_for_memory_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All images fit into one batch, so that to begin it again would be to begin the ranking again."""
    genuine, refused = scorer_module.SharedForward, []

    def limited(model: Any, layers: Any, images: Any, start: Any, copies: int = 1, *more: Any) -> Any:
        if len(images) * copies > 16:
            refused.append(copies)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(model, layers, images, start, copies, *more)

    score, checkpoint, whole, rest = scorer(Plain), Checkpoint(tmp_path / "ranking.pt", {}), list[int](), list[int]()
    monkeypatch.setattr(scorer_module, "SharedForward", limited)
    expected = score(rows=64, progress=whole.append)
    assert len(refused) == 2
    with pytest.raises(KeyboardInterrupt):
        score(rows=64, progress=stops_at(3, KeyboardInterrupt), checkpoint=checkpoint)
    refused.clear()
    monkeypatch.setattr(Counts, "put", lambda self, *args, put=Counts.put: rest.append(1) or put(self, *args))
    assert equal(score(rows=64, checkpoint=checkpoint), expected)
    assert not refused and 0 < len(rest) < len(whole)


def test_what_is_saved_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    score, checkpoint = scorer(Plain), Checkpoint(tmp_path / "ranking.pt", {})
    first = score(rows=3, checkpoint=checkpoint)
    monkeypatch.setattr(Counts, "put", lambda *_: pytest.fail("scored again"))
    assert equal(score(rows=3, checkpoint=checkpoint), first)


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(1, 12), rows=st.integers(1, 12), then=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_seeds_chunks_and_stops_change_no_bit(stop: int, rows: int, then: int, seed: int):
    """Stopped after any group under one chunk size, continued under another: the bits of one go under a third."""
    import tempfile

    score = scorer(SmallPreActResNet, 5)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder) / "ranking.pt", {"seed": seed})
        try:
            found = score(rows=rows, seed=seed, progress=stops_at(stop, KeyboardInterrupt), checkpoint=checkpoint)
        except KeyboardInterrupt:
            found = score(rows=then, seed=seed, checkpoint=checkpoint)
    assert equal(found, score(seed=seed))


def test_a_ranking_goes_on_with_another_number_of_threads(tmp_path: Path):
    """Threads decide how batches are filled up, so how many maps share one; a map passed over would keep the count 0."""
    score, threads = scorer(Plain, 5), torch.get_num_threads()
    checkpoint = Checkpoint(tmp_path / "ranking.pt", {})
    try:
        torch.set_num_threads(4)
        expected = score(rows=32)
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            score(rows=32, progress=stops_at(2, KeyboardInterrupt), checkpoint=checkpoint)
        torch.set_num_threads(4)
        found = score(rows=32, checkpoint=checkpoint)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.correct, expected.correct) and torch.allclose(found.margin, expected.margin)


def test_a_race_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed when it begins to score contenders: what was predicted before is read again."""
    monkeypatch.setattr(racing, "CALIBRATION_MAPS", 1)  # the model has few maps
    model, images, labels = toy_case(Plain, count=7)
    scorer = make_scorer(model, trace_conv_layers(model.network, images[:1]), images, labels, eps=EPS)
    expected = race(scorer, 4, "global", cheap_precision=torch.float32)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FeatureMapScorer, "score", killed)
        race(scorer, 4, "global", RankingCheckpoints(tmp_path, "k" * 64, fresh=True), torch.float32)
    assert list(tmp_path.glob("ranking_kkkkkkkkkkkkkkkk_*"))
    checkpoints = RankingCheckpoints(tmp_path, "k" * 64, fresh=False)
    found = race(scorer, 4, "global", checkpoints, torch.float32)
    assert equal(found, expected) and found.settled is not None and torch.equal(found.settled, expected.settled)
    (tmp_path / "ranking_kkkkkkkkkkkkkkkk_00000000_1of2.pt").touch()  # of a process that there is no more
    checkpoints.remove()
    assert not list(tmp_path.iterdir())


def saved(score: Callable[..., Scores], path: Path) -> dict[str, Any]:
    score(checkpoint=Checkpoint(path, {"key": "a"}))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "change, remedy",
    [
        (lambda content: content["made_with"].update(key="another record"), "start again with --fresh"),
        (lambda content: content.pop("state"), "remove it"),
        (lambda content: content.update(made_with=None), "remove it"),
        (lambda content: content["state"].pop("rows"), "remove it"),
        (lambda content: content["state"].update(images=-1), "remove it"),
        (lambda content: content["state"].update(whole=7), "remove it"),
        (lambda content: content["state"]["whole"].update(margin=torch.zeros(3)), "remove it"),
        (lambda content: content["state"]["whole"].update(margin="x"), "remove it"),
        (lambda content: content["state"]["part"].pop("smallest_margin"), "remove it"),
    ],
)
def test_a_stale_or_forged_state_is_refused(change: Callable[[dict[str, Any]], Any], remedy: str, tmp_path: Path):
    score, path = scorer(Plain), tmp_path / "ranking.pt"
    content = saved(score, path)
    change(content)
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"ranking\.pt .*{remedy}"):
        score(checkpoint=Checkpoint(path, {"key": "a"}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.99])
def test_a_truncated_state_is_refused(share: float, tmp_path: Path):
    score, path = scorer(Plain), tmp_path / "ranking.pt"
    saved(score, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"ranking\.pt is not a whole torch file .*remove it"):
        score(checkpoint=Checkpoint(path, {"key": "a"}))
