"""Scores that can be worked out on paper; what may not change them."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.frg.scorer_state import RankingState
from fmp_core.frg.scores import Scores, layer_slices, lowest
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.system.devices import has_fast_bfloat16
from reference import score
from scoring import score_feature_maps
from torch import Tensor, nn
from toy import OutOfOrder, Plain, SmallPreActResNet
from toy_cases import Normalised, footprint, toy_case, weights

needs_bfloat16 = pytest.mark.skipif(not has_fast_bfloat16(torch.device("cpu")), reason="this CPU emulates bfloat16, slowly")


class OnPaper(nn.Module):
    """Images of one row and two pixels (a, b); maps f0 = a - b, f1 = a + b, f2 = b; logits (0, 10*f0)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, (1, 2), bias=False), nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 1.0]]).view(3, 1, 1, 2))
            self.head.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


def on_paper(**options: float) -> Scores:
    model = OnPaper()
    images = torch.tensor([[0.5, 0.35], [0.05, 0.6]]).view(2, 1, 1, 2)  # image A, image B
    labels = torch.tensor([1, 0])  # A has a > b: class 1; B has a < b: class 0
    return score_feature_maps(model, trace_conv_layers(model, images), images, labels, eps=0.1, seed=0, **options)  # type: ignore[arg-type]


class Wide(nn.Sequential):
    """Wide 1x1 convolutions, which oneDNN computes in another way on few images, with one thread."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 1), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))


def test_wide_networks_score_alike_in_small_batches() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model, images = Wide().eval(), torch.rand(4, 3, 16, 16)
        about = (model, trace_conv_layers(model, images), images, torch.tensor([0, 1, 2, 3]))
        large, *small = (score_feature_maps(*about, eps=8 / 255, rows=rows) for rows in (64, 2, 7, 33))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(scores.margin, large.margin) for scores in small)


@pytest.mark.parametrize("count", [17, 33])
def test_images_that_fill_no_second_batch_score_as_in_one(count: int) -> None:
    """Shared passes of 9 and 8 images would round otherwise than one of 17, in 1x1 convolutions of 512 maps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        first = (nn.Conv2d(3, 512, 3, 2, 1), nn.ReLU(), nn.Conv2d(512, 128, 1), nn.ReLU(), nn.Conv2d(128, 16, 3, 2, 1))
        model, images = nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 10)).eval(), torch.rand(count, 3, 16, 16)
        about = (model, trace_conv_layers(model, images[:1]), images, torch.arange(count) % 10)
        maps = torch.arange(656) % 8 == 0
        large, small = (score_feature_maps(*about, eps=8 / 255, rows=rows, maps=maps) for rows in (64, 16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(small.margin, large.margin)


def test_one_step_on_paper() -> None:
    # torch.rand with seed 0 draws 0.4963 0.7682 | 0.0885 0.1320, so the noise 2u-1 is (-0.0075, +0.5364) | (-0.8230, -0.7359).
    # x0 = clamp(x + 0.1*noise):  A (0.4993, 0.4036), so x0 - x = (-0.0007, +0.0536)
    #                             B (0     , 0.5264), so x0 - x = (-0.05  , -0.0736); the clamp cut a's -0.0823
    # f is linear, f(x0) - f(x) = w.(x0 - x) = d, and the gradient of d^2 is 2*d*w; x' = clamp(x + 0.1*sign(d*w)):
    # f0, w = (1,-1): A d = -0.0544, sign (-,+), x' = (0.4, 0.45), logit 10*(a-b) = -0.5: wrong, margin -0.5
    #                 B d = +0.0236, sign (+,-), x' = (0.15, 0.5), logit -3.5:             right, margin 3.5
    #                   (without the clamp of x0: d = -0.0087, x' = (0, 0.7), margin 7)
    # f1, w = (1, 1): A d = +0.0529, sign (+,+), x' = (0.6, 0.45), logit +1.5:             right, margin 1.5
    #                 B d = -0.1236, sign (-,-), x' = (0, 0.5): a is clamped, logit -5:    right, margin 5
    # f2, w = (0, 1): A d = +0.0536, sign (0,+), x' = (0.5, 0.45), logit +0.5:             right, margin 0.5
    #                 B d = -0.0736, sign (0,-), x' = (0.05, 0.5), logit -4.5:             right, margin 4.5
    scores = on_paper()
    assert scores.correct.tolist() == [1, 2, 2]
    assert scores.margin.tolist() == pytest.approx([1.5, 3.25, 2.5], abs=1e-5)
    assert (scores.samples, scores.total) == (2, 3)
    assert scores.order().tolist() == [0, 2, 1]  # f1 and f2 tie in counts; f2 has the lower margin
    for scope in ("layer", "global"):
        assert lowest(scores, 3, scope)[0].tolist() == [True, False, False]


def test_three_small_steps_on_paper() -> None:
    # Steps of 0.01 from x0 move by the sign of d*w each time (|d| only grows), and may not leave the ball of 0.1:
    # f0: A (0.4993-0.03, 0.4036+0.03) = (0.4693, 0.4336), margin +0.3561: right. The single big step made it wrong.
    #     B (0+0.03, 0.5264-0.03) = (0.03, 0.4964), and the ball ends at b = 0.5: margin 4.7
    # f1: A (0.5293, 0.4336), margin 0.9561;  B (0, 0.5), margin 5
    # f2: A (0.4993, 0.4336), margin 0.6561;  B (0, 0.5), margin 5
    scores = on_paper(steps=3, alpha=0.01)
    assert scores.correct.tolist() == [2, 2, 2]
    expected = [(0.3561 + 4.7) / 2, (0.9561 + 5) / 2, (0.6561 + 5) / 2]
    assert scores.margin.tolist() == pytest.approx(expected, abs=2e-3)


def test_large_steps_stay_in_the_ball_on_paper() -> None:
    # alpha = 0.5 oversteps; the projection ends at x +- 0.1 in every pixel that w reaches, which one step reached at once.
    # f2 leaves pixel a where the noise put it: A a = 0.49925, b = 0.45: margin 0.4925; B a = 0, b = 0.5: margin 5.
    scores = on_paper(steps=2, alpha=0.5)
    assert scores.correct.tolist() == [1, 2, 2]
    assert scores.margin.tolist() == pytest.approx([1.5, 3.25, (0.4925 + 5) / 2], abs=1e-3)


def test_alpha_defaults_to_two_and_a_half_eps_over_steps() -> None:
    assert torch.equal(on_paper(steps=5).margin, on_paper(steps=5, alpha=0.05).margin)
    assert not torch.equal(on_paper(steps=5).margin, on_paper(steps=5, alpha=0.01).margin)


EPS = 16 / 255


@pytest.mark.parametrize("steps", [1, 3])
def test_rows_change_no_bit(steps: int) -> None:
    model, images, labels = toy_case(SmallPreActResNet, count=7)
    assert_rows_change_no_bit(model, images, labels, (1, 2, 3, 7, 30), steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_change_no_bit_where_maps_are_single_pixels(dtype: torch.dtype, count: int) -> None:
    """On 8x8 images resnet18 is matrix products of few rows, for which MKL and oneDNN have kernels of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PixelModel(build_model("resnet18", 10), DatasetFacts(10, (8, 8, 3))).eval()
        images, labels = torch.rand(count, 3, 8, 8), torch.randint(0, 10, (count,))
    maps = torch.arange(4800) % 160 == 0
    assert_rows_change_no_bit(model, images, labels, (1, 8, 33), dtype=dtype, maps=maps)


def assert_rows_change_no_bit(model: Any, images: Tensor, labels: Tensor, rows: tuple[int, ...], **options: Any) -> None:
    layers = trace_conv_layers(model.network, images[:1])
    expected = score_feature_maps(model, layers, images, labels, eps=EPS, **options)
    for number in rows:
        actual = score_feature_maps(model, layers, images, labels, eps=EPS, rows=number, **options)
        for ours, theirs in zip(vars(actual).values(), vars(expected).values(), strict=True):
            assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    model, images, labels = toy_case(Plain)
    layers = trace_conv_layers(model.network, images[:1])
    first, second, other = (score_feature_maps(model, layers, images, labels, eps=EPS, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.correct, second.correct) and torch.equal(first.margin, second.margin)
    assert not torch.equal(first.margin, other.margin)


def test_scoring_neither_reads_nor_moves_the_global_generator() -> None:
    model, images, labels = toy_case(Plain)
    layers = trace_conv_layers(model.network, images[:1])
    torch.manual_seed(1)
    first, after = score_feature_maps(model, layers, images, labels, eps=EPS), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(2)
    assert torch.equal(score_feature_maps(model, layers, images, labels, eps=EPS).margin, first.margin)


def test_progress_adds_up_to_all_map_image_pairs() -> None:
    model, images, labels = toy_case(Plain, count=7)
    layers = trace_conv_layers(model.network, images[:1])
    for rows in (None, 3):
        pairs: list[int] = []
        scores = score_feature_maps(model, layers, images, labels, eps=EPS, rows=rows, progress=pairs.append)
        assert sum(pairs) == scores.total * 7 and min(pairs) > 0


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_no_trace(training: bool) -> None:
    model, images, labels = toy_case(Plain)
    model.train(training)
    model.network.bn1.eval()
    model.network.conv1.weight.requires_grad_(False)
    layers = trace_conv_layers(model.network, images[:1])
    before, state, pixels = footprint(model), weights(model), images.clone()
    score_feature_maps(model, layers, images, labels, eps=EPS, steps=2)
    assert footprint(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, pixels) and not images.requires_grad


class Breaks(Normalised):
    """Raises in the forward pass of number ``at``."""

    def __init__(self, network: nn.Module, at: int):
        super().__init__(network)
        self.left = at

    def forward(self, pixels: Tensor) -> Tensor:
        out = super().forward(pixels)
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("boom")
        return out


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_scoring_leaves_no_trace_after_an_exception_in_the_model(at: int, steps: int) -> None:
    network = toy_case(Plain)[0].network.train()
    _, images, labels = toy_case(Plain)
    layers = trace_conv_layers(network, images[:1])
    model = Breaks(network, at).train()
    before = footprint(model)
    with pytest.raises(RuntimeError, match="boom"):
        score_feature_maps(model, layers, images, labels, eps=EPS, steps=steps, rows=4)
    assert footprint(model) == before
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert model.network.conv1(images).requires_grad  # nothing is still switched


def test_a_map_that_does_not_depend_on_the_image_leaves_it_as_it_is() -> None:
    """A pruned filter has gradient 0, so x' = x and its score is the clean accuracy."""
    model, images, labels = toy_case(Plain)
    with torch.no_grad():
        model.network.conv1.weight[2] = 0
    labels = labels.clone()
    labels[0] = (labels[0] + 1) % 5
    logits = model(images).detach()
    scores = score_feature_maps(model, trace_conv_layers(model.network, images[:1]), images, labels, eps=EPS)
    assert int(scores.correct[2]) == int((logits.argmax(1) == labels).sum())


def test_scores_belong_to_the_layer_of_that_name() -> None:
    """Registered in another order than run: each layer's scores are those of its own maps, asked for alone."""
    model, images, labels = toy_case(OutOfOrder)
    layers = trace_conv_layers(model.network, images[:1])
    scores = score_feature_maps(model, layers, images, labels, eps=EPS)
    assert [layer.name for layer, _ in layer_slices(scores.layers)] == ["conv_a", "conv_b", "shortcut"]
    for layer, where in layer_slices(scores.layers):
        alone = score(model, [layer], images, labels, eps=EPS)
        torch.testing.assert_close(scores.margin[where], alone.margins.mean(1), rtol=1e-4, atol=1e-4)


def test_an_interrupted_batch_is_counted_whole_or_not_at_all() -> None:
    """Ctrl-C comes between any two steps of Python, and the state is saved as it is then."""
    state = RankingState.empty(3, 4, torch.device("cpu"))
    state.part.correct.add_(2)
    state.groups, state.copies = 1, 3
    seen = []

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_name in ("end_batch", "_batch_of", "plus", "empty"):
            frame.f_trace_opcodes = True
            seen.append((state.images, state.groups, int(state.whole.correct.sum()), int(state.part.correct.sum())))
            return interrupt
        return None

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        state.end_batch(5)
    finally:
        sys.settrace(before)
    assert set(seen) == {(0, 1, 0, 6), (5, 0, 6, 0)} and (state.images, state.groups) == (5, 0)
