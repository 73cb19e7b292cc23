"""Racing: the selection is that of the exact scores."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fmp_core.frg.image_racing import foretell_scores, mean_reverse
from fmp_core.frg.margin_taylor import MarginTaylor
from fmp_core.frg.racing import race
from fmp_core.frg.reverse import SharedForward
from fmp_core.frg.scorer import Scores, choose, score_feature_maps
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from torch import Tensor, nn
from toy import SmallPreActResNet, toy_case


def scores_of(correct: Tensor, margin: Tensor, widths: tuple[int, ...], smallest_margin: float = 1.0) -> Scores:
    layers = tuple(ConvLayer(f"c{i}", nn.Conv2d(1, width, 1)) for i, width in enumerate(widths))
    return Scores(layers, correct, margin, torch.full((len(correct),), smallest_margin), 32)


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
    cheap.smallest_margin[100] = 0.0001
    raced, rescored = run(cheap, exact, 64, "layer")
    assert choose(raced, 64, "layer").mask.nonzero().flatten().tolist() == [0, 100]
    assert rescored == 5


def test_a_batch_that_memory_ran_out_in_is_seen_once(monkeypatch: pytest.MonkeyPatch):
    """The allocator refuses once, within a batch: what was summed over its first maps is not summed twice."""
    model, images, labels = toy_case(SmallPreActResNet, count=12)
    layers = trace_conv_layers(model.network, images[:1])

    def score(wanted: Tensor, watch: Any) -> Scores:
        return score_feature_maps(model, layers, images, labels, eps=0.05, rows=8, wanted=wanted, watch=watch)

    expected = mean_reverse(score, layers, images)
    genuine, calls = SharedForward.reversed_images, []

    def refuses_once(self: SharedForward, *asked: Any) -> Tensor:
        calls.append(asked)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(self, *asked)

    monkeypatch.setattr(SharedForward, "reversed_images", refuses_once)
    found = mean_reverse(score, layers, images)
    assert len(calls) > 5 and torch.equal(found, expected)


def test_dropped_maps_rank_behind_all_settled_ones():
    widths = (128,)
    correct, margin = torch.full((128,), 5), torch.arange(128, dtype=torch.float64)
    raced, rescored = run(scores_of(correct, margin, widths), scores_of(correct, margin, widths), 64, "layer")
    assert raced.settled is not None
    assert rescored == int(raced.settled.sum()) == 4
    assert raced.settled[raced.order()[:4]].all()


def wide_net(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small network with wide layers, and images most of which it classifies as labelled, some by a hair."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.Conv2d(96, 192, 3, 2, padding=1),
        nn.BatchNorm2d(192),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192 * 16, 5),
    ).eval()
    images = torch.rand(24, 3, 8, 8, generator=generator)
    with torch.no_grad():
        ranking = net(images).topk(2).indices
    wrong = torch.rand(24, generator=generator) < 0.2
    return net, images, torch.where(wrong, ranking[:, 1], ranking[:, 0])


class Counting:
    """Scores feature maps, and counts the (map, image) pairs and those whose margin was foretold."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, eps: float):
        self.layers = trace_conv_layers(net, images[:1])
        self.score = partial(score_feature_maps, net, self.layers, images, labels, eps=eps)
        self.images = len(images)
        self.pairs = self.foretold = 0

    def __call__(self, wanted: Tensor, which: Tensor | None = None, foretell: Any = None, **options: Any) -> Scores:
        pairs = int(wanted.sum()) * (self.images if which is None else len(which))
        self.pairs += pairs
        self.foretold += pairs if foretell else 0
        return self.score(wanted=wanted, which=which, foretell=foretell, **{"dtype": torch.bfloat16, **options})


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("seed", range(3))
def test_foretold_scores_lead_to_the_exact_selection(seed: int, scope: str, eps: float):
    net, images, labels = wide_net(seed)
    score = Counting(net, images, labels, eps)
    first_order = MarginTaylor(net, mean_reverse(score, score.layers, images), labels)
    foretold, error = foretell_scores(score, first_order, score.layers, 16, scope)
    assert score.foretold > score.pairs / 3
    low = race(foretold, score, 16, scope, error)
    raced = race(low, partial(score, dtype=torch.float32), 16, scope)
    exact = score.score()
    assert torch.equal(choose(raced, 16, scope).mask, choose(exact, 16, scope).mask)
    settled = raced.settled
    assert settled is not None and 0 < int(settled.sum()) < foretold.total
    assert torch.equal(raced.correct[settled], exact.correct[settled])
    assert torch.equal(raced.margin[settled], exact.margin[settled])
    assert (raced.margin[~settled] <= exact.margin[~settled]).all(), "a floor above the margin"


def test_first_order_is_exact_on_a_linear_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    reverse = images + 0.1 * torch.randn(4, 5, 3, 2, 2)
    which = torch.tensor([3, 0])
    with torch.no_grad():
        logits = net(reverse[:, which].flatten(0, 1)).view(4, 2, 3)
    found = MarginTaylor(net, images, labels).margins(reverse[:, which], which)
    expected = logits[..., 0] - logits[..., 1:].amax(-1)  # both images are of class 0
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_model_answers_where_first_order_is_not_sure():
    """Foretold margins that are all wrong, and no sure one among them, change nothing."""
    net, images, labels = wide_net(0)
    score = Counting(net, images, labels, 1 / 255)

    def never_sure(reverse: Tensor, _first: int) -> tuple[Tensor, Tensor]:
        return torch.full(reverse.shape[:2], -1.0), torch.zeros(reverse.shape[:2], dtype=torch.bool)

    exact = score.score()
    found = score.score(foretell=never_sure)
    assert torch.equal(found.correct, exact.correct) and torch.allclose(found.smallest_margin, exact.smallest_margin, atol=1e-5)
    assert torch.allclose(found.margin, exact.margin, atol=1e-5)
