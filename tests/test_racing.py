"""Racing over images and precision: the selection is that of the exact scores."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fmp_core.feature_maps import ConvLayer
from fmp_core.image_racing import count_with_few_images
from fmp_core.racing import race
from fmp_core.ranking import Scores, choose
from torch import Tensor, nn


def scores_of(correct: Tensor, margin: Tensor, widths: tuple[int, ...], slimmest: float = 1.0) -> Scores:
    layers = tuple(ConvLayer(f"c{i}", nn.Conv2d(1, width, 1)) for i, width in enumerate(widths))
    return Scores(layers, correct, margin, torch.full((len(correct),), slimmest), torch.zeros(len(correct), 2), 32)


def run(cheap: Scores, exact: Scores, p: int, scope: str) -> tuple[Scores, int]:
    rescored = torch.zeros(cheap.total, dtype=torch.bool)

    def score(wanted: Tensor) -> Scores:
        assert not (rescored & wanted).any(), "a map was scored twice"
        rescored.logical_or_(wanted)
        return replace(exact, correct=exact.correct * wanted, margin=exact.margin * wanted)

    return race(cheap, score, p, scope), int(rescored.sum())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("seed", range(5))
def test_the_selection_is_the_exact_one_at_a_fraction_of_the_cost(seed: int, scope: str):
    generator = torch.Generator().manual_seed(seed)
    widths = (256, 512)
    correct = torch.randint(26, 31, (768,), generator=generator)
    margin = torch.randn(768, generator=generator, dtype=torch.float64)
    noise = 0.002 * torch.randn(768, generator=generator, dtype=torch.float64)
    exact, cheap = scores_of(correct, margin, widths), scores_of(correct, margin + noise, widths)
    raced, rescored = run(cheap, exact, 64, scope)
    assert torch.equal(choose(raced, 64, scope).mask, choose(exact, 64, scope).mask)
    assert rescored < 768 // 10


def test_a_map_whose_count_may_be_wrong_is_rescored():
    widths = (128,)
    margin = torch.arange(128, dtype=torch.float64)
    exact = scores_of(torch.full((128,), 20), margin, widths)
    exact.correct[100] = 19  # bfloat16 counted one more: an image that is barely right, barely wrong in float32
    cheap = scores_of(torch.full((128,), 20), margin + 0.001, widths)
    cheap.slimmest[100] = 0.0001
    raced, rescored = run(cheap, exact, 64, "layer")
    assert choose(raced, 64, "layer").mask.nonzero().flatten().tolist() == [0, 100]
    assert rescored == 5


def test_dropped_maps_rank_behind_all_settled_ones():
    widths = (128,)
    correct, margin = torch.full((128,), 5), torch.arange(128, dtype=torch.float64)
    raced, rescored = run(scores_of(correct, margin, widths), scores_of(correct, margin, widths), 64, "layer")
    assert raced.settled is not None
    assert rescored == int(raced.settled.sum()) == 4
    assert raced.settled[raced.order()[:4]].all()


class Margins:
    """Scores maps from a table of margins ``[N, M]``, and counts what it was asked for."""

    def __init__(self, table: Tensor, widths: tuple[int, ...]):
        self.table = table
        self.layers = scores_of(table[:, 0].long(), table[:, 0], widths).layers
        self.asked = torch.zeros(table.shape, dtype=torch.int64)

    def __call__(
        self, wanted: Tensor, which: Tensor | None = None, watch: Callable[[Tensor, Tensor, int], None] | None = None
    ) -> Scores:
        which = torch.arange(self.table.shape[1]) if which is None else which
        part = self.table[:, which]
        self.asked[wanted.nonzero(), which] += 1
        if watch is not None:
            for where, first in ((wanted.nonzero().flatten(), 0),):
                watch(where, part[where], first)
        correct, slimmest = (part > 0).sum(1), torch.where(part > 0, part, torch.inf).amin(1)
        mine = wanted.double()
        margin = part.mean(1) * mine
        slimmest = torch.where(wanted, slimmest, torch.inf)
        return Scores(self.layers, correct * wanted, margin, slimmest, torch.zeros(len(part), 2), len(which))


def slim_margins(widths: tuple[int, ...], images: int, seed: int) -> Tensor:
    """Each image has a margin of its own, from wide to slim, and each map moves it a little."""
    generator = torch.Generator().manual_seed(seed)
    level = 3 * torch.randn(images, generator=generator, dtype=torch.float64) + 3
    return level + 0.4 * torch.randn(sum(widths), images, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("seed", range(5))
def test_few_images_settle_the_counts(seed: int, scope: str):
    widths = (128, 512, 256)
    score = Margins(slim_margins(widths, 40, seed), widths)
    found = count_with_few_images(score, score.layers, 40, 64, scope)
    exact = score(torch.ones(sum(widths), dtype=torch.bool))
    assert score.asked.max() == 2, "something was scored twice"  # once by the race, once just now
    assert int(score.asked.sum()) - exact.total * 40 < 0.8 * exact.total * 40
    full = torch.isfinite(found.margin)
    assert torch.equal(found.correct, exact.correct)
    assert torch.allclose(found.margin[full], exact.margin[full]) and torch.equal(found.slimmest[full], exact.slimmest[full])
    assert torch.equal(choose(found, 64, scope).mask, choose(exact, 64, scope).mask)
    raced, _ = run(found, exact, 64, scope)
    assert torch.equal(choose(raced, 64, scope).mask, choose(exact, 64, scope).mask)


def test_images_that_pilots_dispute_are_scored_for_all_maps():
    widths = (128,)
    table = slim_margins(widths, 16, 0)
    table[:, :] = 5.0
    table[::3, 4] = -1.0  # of every layer's pilots some turn image 4
    score = Margins(table, widths)
    found = count_with_few_images(score, score.layers, 16, 64, "layer")
    assert torch.equal(found.correct, (table > 0).sum(1))
    assert (score.asked[:, 4] == 1).all()
