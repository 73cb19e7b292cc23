"""Racing: the selection is that of the exact scores."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fmp_core.frg import margin_taylor, racing
from fmp_core.frg.margin_taylor import MarginTaylor
from fmp_core.frg.racing import mean_reverse, predict_scores, race, score_contenders
from fmp_core.frg.reverse import SharedForward
from fmp_core.frg.scores import Scores, lowest
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.system.devices import has_fast_bfloat16
from scoring import make_scorer
from torch import Tensor, nn
from toy import SmallPreActResNet
from toy_cases import toy_case

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not has_fast_bfloat16(CPU), reason="this CPU emulates bfloat16, slowly")


def scores_of(correct: Tensor, margin: Tensor, widths: tuple[int, ...]) -> Scores:
    layers = tuple(ConvLayer(f"c{i}", nn.Conv2d(1, width, 1)) for i, width in enumerate(widths))
    return Scores(layers, correct, margin, torch.ones(len(correct), dtype=torch.float64), 32)


class Lookup:
    """Stands for a scorer whose exact scores are known, and counts the maps it was asked for."""

    precision = torch.float32

    def __init__(self, exact: Scores):
        self.exact, self.scored = exact, torch.zeros(exact.total, dtype=torch.bool)

    def score(self, maps: Tensor, checkpoint: None) -> Scores:
        assert not (self.scored & maps).any(), "a map was scored twice"
        self.scored |= maps
        return replace(self.exact, correct=self.exact.correct * maps, margin=self.exact.margin * maps)


def contend(cheap: Scores, exact: Scores, p: int, scope: str) -> tuple[Scores, int]:
    scorer: Any = Lookup(exact)
    return score_contenders(cheap, scorer, p, scope), int(scorer.scored.sum())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("seed", range(3))
def test_contenders_give_the_exact_selection_at_a_fraction_of_the_cost(seed: int, scope: str):
    generator = torch.Generator().manual_seed(seed)
    widths = (256, 512)
    correct = torch.randint(26, 31, (768,), generator=generator)
    margin = torch.randn(768, generator=generator, dtype=torch.float64)
    noise = 0.002 * torch.randn(768, generator=generator, dtype=torch.float64)
    exact, cheap = scores_of(correct, margin, widths), scores_of(correct, margin + noise, widths)
    raced, scored = contend(cheap, exact, 64, scope)
    assert torch.equal(lowest(raced, 64, scope)[0], lowest(exact, 64, scope)[0])
    assert scored < 768 // 10


@pytest.mark.parametrize("smallest", [0.0001, 0.02])  # errors are 0.001 in the mean of 32 images, 32**0.5 times that in one
def test_a_map_whose_count_may_be_wrong_is_scored_in_full(smallest: float):
    margin = torch.arange(128, dtype=torch.float64)
    exact = scores_of(torch.full((128,), 20), margin, (128,))
    exact.correct[100] = 19  # bfloat16 counted one more: an image that is barely right, barely wrong in float32
    cheap = scores_of(torch.full((128,), 20), margin + 0.001, (128,))
    cheap.smallest_margin[100] = smallest
    raced, scored = contend(cheap, exact, 64, "layer")
    assert lowest(raced, 64, "layer")[0].nonzero().flatten().tolist() == [0, 100]
    assert scored == 5


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_many_images_may_be_wrong_by_more_than_one(seed: int):
    """Bfloat16 counts about 3 in 10000 images otherwise: of 5000 more than one a map."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.randint(4300, 4310, (1024,), generator=generator)
    margin = torch.randn(1024, generator=generator, dtype=torch.float64)
    wrong = torch.poisson(torch.full((2, 1024), 0.7), generator=generator).long()
    noise = 1e-4 * torch.randn(1024, generator=generator, dtype=torch.float64)
    exact = replace(scores_of(correct, margin, (512, 512)), samples=5000, smallest_margin=torch.full((1024,), 1e-5))
    cheap = replace(exact, correct=correct + wrong[0] - wrong[1], margin=margin + noise)
    raced, scored = contend(cheap, exact, 16, "layer")
    assert torch.equal(lowest(raced, 16, "layer")[0], lowest(exact, 16, "layer")[0])
    assert scored < 1024


def test_maps_that_predictions_drop_are_judged_by_full_precision_too():
    """Predicted from bfloat16 margins, then scored in bfloat16, then in float32: what bfloat16 errs by counts in each step."""
    generator = torch.Generator().manual_seed(0)

    def normal(deviation: float) -> Tensor:
        return deviation * torch.randn(512, generator=generator, dtype=torch.float64)

    for _ in range(20):
        correct, low = torch.full((512,), 30), normal(0.004).sort().values
        error = torch.full((512,), 0.0001, dtype=torch.float64)
        exact, in_bfloat16 = scores_of(correct, low + normal(0.0015), (512,)), scores_of(correct, low, (512,))
        predicted = replace(in_bfloat16, margin=low + normal(0.0001), settled=torch.ones(512, dtype=torch.bool))
        scorers: list[Any] = [Lookup(in_bfloat16), Lookup(exact)]
        cheap = score_contenders(predicted, scorers[0], 64, "layer", error=error)
        raced = score_contenders(cheap, scorers[1], 64, "layer")
        assert torch.equal(lowest(raced, 64, "layer")[0], lowest(exact, 64, "layer")[0])


@pytest.mark.parametrize(("error", "distance"), [(None, 0.4), (0.1, 0.625)], ids=["cheap", "predicted"])
def test_a_map_is_dropped_only_so_many_deviations_from_the_cut(error: float | None, distance: float):
    """Errors are 0.1 and the cut is at 0.9; of the maps 4 and 5 one lies just within, one just beyond."""
    cheap = torch.full((128,), 10.0, dtype=torch.float64)
    cheap[:6] = torch.tensor([0, 1, 1.1, 1.2, 0.9 + distance - 0.01, 0.9 + distance + 0.01])
    exact = cheap.clone()
    exact[:5] += torch.tensor([0.1, -0.1, 0.1, -0.1, 0.1])
    told = scores_of(torch.full((128,), 20), cheap, (128,))
    told.smallest_margin.fill_(100.0)  # no count is in doubt
    scorer: Any = Lookup(scores_of(told.correct, exact, (128,)))
    errors = None if error is None else torch.full((128,), error, dtype=torch.float64)
    score_contenders(told, scorer, 64, "layer", error=errors)
    assert scorer.scored.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_dropped_maps_rank_behind_all_settled_ones():
    scores = scores_of(torch.full((128,), 5), torch.arange(128, dtype=torch.float64), (128,))
    raced, scored = contend(scores, scores, 64, "layer")
    assert raced.settled is not None
    assert scored == int(raced.settled.sum()) == 4
    assert raced.settled[raced.order()[:4]].all()


def test_a_batch_that_memory_ran_out_in_counts_once(monkeypatch: pytest.MonkeyPatch):
    """The allocator refuses once, within a batch: what was summed over its first maps is not summed twice."""
    model, images, labels = toy_case(SmallPreActResNet, count=12)
    scorer = make_scorer(model, trace_conv_layers(model.network, images[:1]), images, labels, eps=0.05, rows=8)
    expected = mean_reverse(scorer)
    genuine, calls = SharedForward.reversed_images, []

    def refuses_once(self: SharedForward, *asked: Any) -> Tensor:
        calls.append(asked)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(self, *asked)

    monkeypatch.setattr(SharedForward, "reversed_images", refuses_once)
    assert torch.equal(mean_reverse(scorer), expected) and len(calls) > 5


def wide_net(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small network with wide layers, and images most of which it classifies as labelled, some by a hair."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 96, 3, padding=1),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.Conv2d(96, 128, 3, 2, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 16, 5),
    ).eval()
    images = torch.rand(16, 3, 8, 8, generator=generator)
    with torch.no_grad():
        ranking = net(images).topk(2).indices
    wrong = torch.rand(16, generator=generator) < 0.2
    return net, images, torch.where(wrong, ranking[:, 1], ranking[:, 0])


@pytest.mark.parametrize("cheap", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_racing_gives_the_exact_selection(scope: str, eps: float, cheap: torch.dtype):
    for seed in (0, 1 if cheap == torch.float32 else 2):  # an image of 1 is so near a flip that bfloat16 would leave no map out
        net, images, labels = wide_net(seed)
        scorer = make_scorer(net, trace_conv_layers(net, images[:1]), images, labels, eps=eps)
        raced, exact = race(scorer, 16, scope, cheap_precision=cheap), scorer.score()
        assert torch.equal(lowest(raced, 16, scope)[0], lowest(exact, 16, scope)[0])
        settled = raced.settled
        assert settled is not None and 0 < int(settled.sum()) < raced.total
        assert torch.equal(raced.correct[settled], exact.correct[settled])
        assert torch.equal(raced.margin[settled], exact.margin[settled])
        assert (raced.margin[~settled] <= exact.margin[~settled]).all(), "a floor above the margin"


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_used_only_where_the_hardware_has_it(fast: bool, monkeypatch: pytest.MonkeyPatch):
    net, images, labels = wide_net(0)
    scorer = make_scorer(net, trace_conv_layers(net, images[:1]), images, labels, eps=1 / 255)
    asked: list[torch.dtype] = []

    def in_precision(precision: torch.dtype) -> Any:
        asked.append(precision)
        return scorer

    monkeypatch.setattr(racing, "has_fast_bfloat16", lambda _device: fast)
    monkeypatch.setattr(scorer, "in_precision", in_precision)
    race(scorer, 16, "layer")
    assert asked == [torch.bfloat16 if fast else torch.float32]


def test_first_order_is_exact_on_a_linear_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    reverse = images + 0.1 * torch.randn(4, 5, 3, 2, 2)
    image_ids = torch.tensor([3, 0])
    with torch.no_grad():
        logits = net(reverse[:, image_ids].flatten(0, 1)).view(4, 2, 3)
    found = MarginTaylor(net, images, labels).margins(reverse[:, image_ids], image_ids)
    expected = logits[..., 0] - logits[..., 1:].amax(-1)  # both images are of class 0
    assert torch.allclose(found, expected, atol=1e-6)


def test_expansions_take_fewer_images_at_a_time_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    net, images, labels = wide_net(0)
    expected, whole, sizes = MarginTaylor(net, images, labels), margin_taylor._expansion, []

    def crowded(model: nn.Module, some: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(some))
        if len(some) > 3:
            raise MemoryError
        return whole(model, some, own)

    monkeypatch.setattr(margin_taylor, "_expansion", crowded)
    found = MarginTaylor(net, images, labels, rows=8)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
    assert torch.allclose(found.values, expected.values, atol=1e-5) and found.slopes.shape == expected.slopes.shape


def test_the_model_is_run_where_a_prediction_cannot_be_trusted():
    """Predicted margins that are all wrong, and none of them trusted, change nothing; trusted ones replace the model's."""
    net, images, labels = wide_net(0)
    scorer = make_scorer(net, trace_conv_layers(net, images[:1]), images, labels, eps=1 / 255)

    def never(reverse: Tensor, _image_ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full(reverse.shape[:2], -1.0), torch.zeros(reverse.shape[:2], dtype=torch.bool)

    def always(reverse: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        return (image_ids.float() - 2.5).expand(reverse.shape[:2]).clone(), torch.ones(reverse.shape[:2], dtype=torch.bool)

    exact, found = scorer.count(), scorer.count(predictor=never)
    assert torch.equal(found.correct, exact.correct)
    assert torch.allclose(found.margin, exact.margin, atol=1e-4)
    assert torch.allclose(found.smallest_margin, exact.smallest_margin, atol=1e-5)
    some = scorer.count(image_ids=torch.tensor([1, 4, 2, 3]), predictor=always)
    assert [set(part.tolist()) for part in some] == [{2}, {0.0}, {0.5}]


def test_most_margins_are_predicted(monkeypatch: pytest.MonkeyPatch):
    net, images, labels = wide_net(0)
    scorer = make_scorer(net, trace_conv_layers(net, images[:1]), images, labels, eps=1 / 255)
    answered: list[int] = []
    genuine = type(scorer)._logits
    monkeypatch.setattr(type(scorer), "_logits", lambda self, pixels: answered.append(len(pixels)) or genuine(self, pixels))
    predicted, _ = predict_scores(scorer, 16, "layer")
    assert predicted.total == 224 and sum(answered) < 0.5 * 224 * 16


def test_the_error_of_a_further_map_is_not_that_of_the_maps_it_was_fitted_to() -> None:
    """The residuals are about their own mean: 12 of them are smaller than what a 13th map errs by."""
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(4000, 13, generator=generator, dtype=torch.float64)
    fitted = errors[:, :12] - errors[:, :12].mean(1, keepdim=True)
    told = torch.tensor([racing._error_of_others(row) for row in fitted])
    real = (errors[:, 12] - errors[:, :12].mean(1)).abs()
    assert float(told.square().mean()) == pytest.approx(float(real.square().mean()), rel=0.1)
    assert int((real > racing.STUDENT * told).sum()) <= 2 < int((real > 3 * fitted.square().mean(1).sqrt()).sum())
