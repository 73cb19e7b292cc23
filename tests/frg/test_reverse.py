"""Feature Reverse Generation: the batched form against the paper's loop, and pixel space."""

from __future__ import annotations

import pytest
import torch
from fmp_core.frg.reverse import FrgSettings, SharedForward, fgsm, noisy_start
from fmp_core.models.build import PixelModel
from fmp_core.models.feature_maps import frozen, trace_conv_layers
from reference import score, start
from scoring import score_feature_maps
from torch import Tensor, nn
from toy import NETS, OddConvs, Plain, PreActivation, SmallPreActResNet
from toy_cases import toy_case

EPS = 16 / 255


def compare(kind: type[nn.Module], steps: int = 1, seed: int = 0, alpha: float | None = None, rows: int | None = None) -> None:
    """Counts may differ only for images whose reference margin is 0 within rounding; so may nothing else."""
    model, images, labels = toy_case(kind)
    layers = trace_conv_layers(model.network, images[:1])
    slow = score(model, layers, images, labels, eps=EPS, steps=steps, alpha=alpha, seed=seed)
    fast = score_feature_maps(model, layers, images, labels, eps=EPS, steps=steps, alpha=alpha, seed=seed, rows=rows)
    means = slow.margins.mean(1)
    assert means.max() - means.min() > 0.01, "the case must tell maps apart"
    assert 0 < slow.correct.sum() < slow.margins.numel(), "some images must be misled"
    undecided = (slow.margins.abs() < 1e-4).sum(1)
    assert int(undecided.sum()) <= 2
    assert ((fast.correct - slow.correct).abs() <= undecided).all()
    torch.testing.assert_close(fast.margin, means, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*NETS, OddConvs], ids=lambda kind: kind.__name__)
def test_scores_equal_the_per_map_loop(kind: type[nn.Module]) -> None:
    compare(kind)


@pytest.mark.parametrize("kind", [*NETS, OddConvs], ids=lambda kind: kind.__name__)
def test_three_steps_equal_the_per_map_loop(kind: type[nn.Module]) -> None:
    compare(kind, steps=3)


@pytest.mark.parametrize("seed", [1, 2])
def test_each_seed_equals_the_per_map_loop(seed: int) -> None:
    compare(SmallPreActResNet, seed=seed)


def test_a_given_alpha_equals_the_per_map_loop() -> None:
    compare(Plain, steps=3, alpha=0.3 * EPS)
    compare(PreActivation, steps=2, alpha=5 * EPS)


@pytest.mark.parametrize("rows", [1, 5, 12, 40])
def test_each_batch_size_equals_the_per_map_loop(rows: int) -> None:
    compare(SmallPreActResNet, rows=rows)
    compare(SmallPreActResNet, rows=rows, steps=2)


@pytest.mark.parametrize("kind", [*NETS, OddConvs], ids=lambda kind: kind.__name__)
def test_gradient_signs_equal_the_per_map_loop(kind: type[nn.Module]) -> None:
    """The only test that looks inside: SharedForward.gradient."""
    model, images, labels = toy_case(kind)
    layers = trace_conv_layers(model.network, images[:1])
    slow = score(model, layers, images, labels, eps=EPS)
    position = 0
    with frozen(model):
        shared = SharedForward(model, layers, images, start(images, EPS, 0), 2)
        for layer in layers:
            for channel in range(layer.channels):
                gradient = shared.gradient(layer, [channel, 0])[: len(images)]
                agree = (gradient.sign() == slow.gradients[position].sign()).float().mean()
                assert agree > 0.999, (layer.name, channel, float(agree))
                assert slow.gradients[position].abs().sum() > 0
                position += 1


def test_shared_passes_end_with_the_last_layer_asked_for() -> None:
    """What lies behind it is not run, and changes no bit of the gradient."""
    model, images, _labels = toy_case(PreActivation)
    layers = trace_conv_layers(model, images)
    ran: list[str] = []
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda _module, _inputs, name=layer.name: ran.append(name))
    with frozen(model):
        whole = SharedForward(model, layers, images, start(images, EPS, 0), 2).gradient(layers[1], [0, 3])
        ran.clear()
        part = SharedForward(model, layers[1:2], images, start(images, EPS, 0), 2).gradient(layers[1], [0, 3])
    assert set(ran) == {layers[0].name, layers[1].name}
    assert torch.equal(part, whole)


def test_the_start_is_noisy_within_bounds() -> None:
    images = torch.linspace(0, 1, 5).view(1, 1, 1, 5).expand(1, 3, 40, 5)
    noisy = noisy_start(images, 0.25, seed=1)
    assert 0 <= noisy.min() < 0.01 and 0.99 < noisy.max() <= 1
    change = (noisy - images)[..., 2]  # far from both ends
    assert -0.25 <= change.min() < -0.2 and 0.2 < change.max() <= 0.25 and abs(change.mean()) < 0.05
    assert torch.equal(noisy, noisy_start(images, 0.25, seed=1)) and not torch.equal(noisy, noisy_start(images, 0.25, seed=2))


def test_fgsm_is_a_full_step_by_sign_clamped_to_pixels() -> None:
    images = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0, 0.9]).view(1, 6, 1, 1)
    gradient = torch.tensor([-7.0, 1e-9, -3.0, 0.0, 2.0, 2.0]).view(1, 6, 1, 1)
    assert fgsm(images, gradient, 0.25).flatten().tolist() == [0.0, 0.75, 0.25, 0.5, 1.0, 1.0]


class Seen(nn.Module):
    """A convolution that keeps a copy of the pixels every forward pass brings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.pixels = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), list[Tensor]()

    def forward(self, pixels: Tensor) -> Tensor:
        self.pixels.append(pixels.detach().clone())
        return self.head(self.conv(pixels).relu().mean((2, 3)))


@pytest.mark.parametrize("steps", [1, 4])
def test_every_image_the_model_sees_is_in_pixel_space_and_in_the_eps_ball(steps: int) -> None:
    torch.manual_seed(0)
    model = Seen()
    images = (torch.rand(3, 3, 6, 6) * 2 - 0.5).clamp(0, 1)
    layers = trace_conv_layers(model, images)
    model.pixels.clear()
    score_feature_maps(model, layers, images, torch.zeros(3, dtype=torch.int64), eps=0.1, steps=steps, alpha=0.08)
    seen = torch.cat(model.pixels)
    assert seen.min() >= 0 and seen.max() <= 1
    distance = (seen[:, None] - images[None]).abs().flatten(2).amax(2)  # [rows seen, images]
    assert (distance.amin(1) <= 0.1 + 1e-6).all()
    # and the steps are taken: some images are at the ball's surface in every pixel that the clamp leaves free
    free = (images >= 0.1) & (images <= 0.9)
    surface = [((row - images[near]).abs()[free[near]] > 0.1 - 1e-6).all() for row, near in zip(seen, distance.argmin(1))]  # noqa: B905
    assert sum(bool(x) for x in surface) >= 3


def test_the_model_normalises_once() -> None:
    """A model whose first map is the pixel itself: what reaches the convolution is (x - mean) / std of pixels in [0,1]."""

    class Facts:
        mean, std = (0.25, 0.5, 0.75), (0.5, 0.25, 0.125)

    network = Seen()
    model = PixelModel(network, Facts)  # type: ignore[arg-type]
    images = torch.rand(2, 3, 6, 6)
    layers = trace_conv_layers(network, images)
    network.pixels.clear()
    score_feature_maps(model, layers, images, torch.zeros(2, dtype=torch.int64), eps=1 / 255)
    mean, std = torch.tensor(Facts.mean).view(1, 3, 1, 1), torch.tensor(Facts.std).view(1, 3, 1, 1)
    pixels = torch.cat(network.pixels) * std + mean
    distance = (pixels[:, None] - images[None]).abs().flatten(2).amax(2).amin(1)
    assert (distance <= 1 / 255 + 1e-5).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_frg_images_carry_no_graph(steps: int) -> None:
    """Also where the convolution reads the pixels themselves."""
    model, images = Seen(), torch.rand(2, 3, 6, 6)
    layers = trace_conv_layers(model, images)
    with frozen(model):
        shared = SharedForward(model, layers, images, start(images, EPS, 0))
        assert not shared.reversed_images(layers[0], [0], FrgSettings(EPS, steps)).requires_grad
