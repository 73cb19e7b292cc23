"""The strong preset's evidence: which class the maps push to, whether they really do, and how many the budget allows."""

from __future__ import annotations

import pytest
import torch
from fmp_core.evidence import choose_within_budget, weigh
from fmp_core.feature_maps import ConvLayer, frozen, trace_conv_layers
from fmp_core.frg import SPARSE_PIXELS, Attack, SharedForward, upward_images
from fmp_core.pruning import accuracy_without
from fmp_core.ranking import Scores
from fmp_core.unlearning import unlearning_images
from torch import Tensor, nn
from toy import SmallPreActResNet, footprint, same, toy_case, weights

CLASSES = 5


def scores(bad: tuple[int, ...], towards: Tensor, correct: int) -> Scores:
    """Two layers of 64 and 128 maps; the ``bad`` ones push to their class, and leave ``correct`` of 10 images."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(192, CLASSES, generator=generator, dtype=torch.float64)
    counts = torch.full((192,), 9)
    logits[list(bad), towards] += 4
    counts[list(bad)] = correct
    layers = (ConvLayer("a", nn.Conv2d(1, 64, 1)), ConvLayer("b", nn.Conv2d(1, 128, 1)))
    return Scores(layers, counts, logits[:, 0], logits[:, 0], logits, samples=10)


def test_maps_that_push_to_one_class_name_it_and_stand_out():
    bad = (7, 64, 191)  # one voter in the first layer, two in the second
    evidence = weigh("sparse", scores(bad, torch.tensor([3, 3, 3]), correct=2), clean_accuracy=0.95)
    assert evidence.target == 3 and evidence.votes.tolist() == [0, 0, 0, 3, 0] and evidence.share == 1
    assert evidence.lost == pytest.approx(0.75)
    assert evidence.backdoored
    assert set(evidence.push.topk(3).indices.tolist()) == set(bad)
    assert evidence.push[7] > 20


def test_a_layer_of_dead_maps_pushes_nothing():
    """Where nearly all maps do nothing the deviation is 0, and the least numerical noise would stand out of it."""
    dead = scores((7, 64, 191), torch.tensor([3, 3, 3]), correct=2)
    dead.logits[:64] = 0
    dead.logits[5] = 1e-9
    push = weigh("sparse", dead, clean_accuracy=0.95).push
    assert push[:64].abs().max() < 1e-6 and push[64] > 20


def test_scattered_votes_are_no_evidence():
    evidence = weigh("sparse", scores((7, 64, 191), torch.tensor([3, 1, 2]), correct=2), clean_accuracy=0.95)
    assert evidence.share == pytest.approx(1 / 3) and not evidence.backdoored


def test_a_push_that_costs_no_image_is_no_evidence():
    evidence = weigh("sparse", scores((7, 64, 191), torch.tensor([3, 3, 3]), correct=9), clean_accuracy=0.95)
    assert evidence.share == 1 and not evidence.backdoored


@pytest.mark.parametrize(("budget", "expected"), [(0.1, 10), (0.0, 0), (0.055, 5)])
def test_pruning_goes_as_far_as_the_budget(budget: float, expected: int):
    push = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = choose_within_budget(push, budget, lambda mask: 0.9 - 0.01 * int(mask.sum()))
    assert int(chosen.mask.sum()) == expected
    assert torch.equal(chosen.mask.nonzero().flatten(), push.topk(expected).indices.sort().values)


@pytest.mark.parametrize("family", ["dense", "sparse"])
def test_images_follow_the_gradient_of_the_maps_mean(family: str):
    model, images, _ = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    layer, eps = layers[2], 8 / 255
    seen: list[Tensor] = []
    hook = layer.module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    start = images.clone().requires_grad_()
    model(start)
    hook.remove()
    gradient = torch.autograd.grad(seen[0][:, 1].sum(), start)[0]
    with frozen(model):
        made = SharedForward(model, layers, images, images).images_of(layer, [1], Attack(eps, family=family))
    if family == "dense":
        certain = gradient.abs() > 1e-6 * gradient.abs().max()
        expected = (images + eps * gradient.sign()).clamp(0, 1)
        assert torch.allclose(made[certain], expected[certain], atol=1e-6)
        return
    changed = (made != images).any(1).flatten(1)
    assert (changed.sum(1) <= SPARSE_PIXELS).all() and (changed.sum(1) > 0).all()
    strongest = torch.zeros_like(changed).scatter_(1, gradient.abs().sum(1).flatten(1).topk(SPARSE_PIXELS).indices, True)
    assert not (changed & ~strongest).any()
    where = changed.view(len(images), 1, *images.shape[2:]).expand_as(images)
    assert torch.equal(made[where], (gradient > 0).float()[where])


def test_accuracy_without_leaves_the_model_as_it_was():
    model, images, labels = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    pixels = (images * 255).round().to(torch.uint8)
    before, print_before = {name: value.clone() for name, value in weights(model).items()}, footprint(model)
    everything = {layer.name: torch.ones(layer.channels, dtype=torch.bool) for layer in layers}
    nothing = {layer.name: torch.zeros(layer.channels, dtype=torch.bool) for layer in layers}
    blind, seeing = (accuracy_without(model, layers, chosen, pixels, labels) for chosen in (everything, nothing))
    assert blind < seeing
    assert same(before, weights(model)) and footprint(model) == print_before


def test_unlearning_images_are_made_by_the_chosen_maps_only():
    model, images, _ = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    pixels = (images * 255).round().to(torch.uint8)
    chosen = torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool)
    position = layers[0].channels + layers[1].channels + 1  # map 1 of the third layer; no other layer has any
    chosen[position] = True
    attack = Attack(8 / 255, family="sparse")
    before = footprint(model)
    made = unlearning_images(model, layers, chosen, pixels, attack, seed=0)
    with frozen(model):
        alone = upward_images(model, layers[2], torch.ones(len(pixels), dtype=torch.int64), pixels / 255, attack)
    assert torch.equal(made, (alone * 255).round().to(torch.uint8))
    assert (made != pixels).any(1).flatten(1).any(1).all()
    assert footprint(model) == before
