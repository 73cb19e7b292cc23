"""Racing rescoring: the selection is that of the exact scores."""

from dataclasses import replace

import pytest
import torch
from fmp_core.feature_maps import ConvLayer
from fmp_core.racing import race
from fmp_core.ranking import Scores, choose
from torch import Tensor, nn


def scores_of(correct: Tensor, margin: Tensor, widths: tuple[int, ...], slimmest: float = 1.0) -> Scores:
    layers = tuple(ConvLayer(f"c{i}", nn.Conv2d(1, width, 1)) for i, width in enumerate(widths))
    return Scores(layers, correct, margin, torch.full((len(correct),), slimmest), torch.zeros(len(correct), 2), 32)


def run(cheap: Scores, exact: Scores, p: int, scope: str) -> tuple[Scores, int]:
    rescored = torch.zeros(cheap.total, dtype=torch.bool)

    def score(dtype: torch.dtype, wanted: Tensor) -> Scores:
        if dtype == torch.bfloat16:
            return cheap
        assert not (rescored & wanted).any(), "a map was scored twice"
        rescored.logical_or_(wanted)
        return replace(exact, correct=exact.correct * wanted, margin=exact.margin * wanted)

    return race(score, cheap.total, p, scope), int(rescored.sum())


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
