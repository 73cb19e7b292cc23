"""TAC against a loop written out, and precision against counting by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fmp_core.models.activation_change import precision_at, trigger_activation_change
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from torch import Tensor, nn
from toy import Plain, PostActivation, PreActivation


def pairs(count: int) -> tuple[Tensor, Tensor]:
    clean = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    poisoned = clean.clone()
    poisoned[:, :, -2:, -2:] = 1
    return clean, poisoned


def slow(model: nn.Module, layers: list[ConvLayer], clean: Tensor, poisoned: Tensor) -> Tensor:
    """One image, one layer, one channel at a time."""
    model.eval()
    found = []
    for layer in layers:
        kept: list[Tensor] = []
        handle = layer.module.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out.detach().clone()))
        for one, other in zip(clean, poisoned, strict=True):
            model(one[None]), model(other[None])
        handle.remove()
        for channel in range(layer.channels):
            changes = [
                (b[0, channel] - a[0, channel]).abs().double().mean() for a, b in zip(kept[::2], kept[1::2], strict=True)
            ]
            found.append(sum(changes) / len(changes))
    return torch.stack(found)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Plain, PreActivation, PostActivation])
def test_tac_is_the_mean_change_of_each_map(kind: type[nn.Module]):
    torch.manual_seed(0)
    model = kind()
    clean, poisoned = pairs(70)  # more than a batch
    layers = trace_conv_layers(model, clean[:1])
    tac = trigger_activation_change(model, layers, clean, poisoned)
    assert tac.dtype == torch.float64 and tac.shape == (sum(layer.channels for layer in layers),)
    torch.testing.assert_close(tac, slow(model, layers, clean, poisoned), rtol=1e-4, atol=1e-6)


def test_memory_for_half_a_batch_is_enough():
    model = Plain()
    clean, poisoned = pairs(40)
    layers = trace_conv_layers(model, clean[:1])
    expected = trigger_activation_change(model, layers, clean, poisoned)

    def refuse(_module: nn.Module, inputs: tuple[Tensor]) -> None:  # after the first layer has counted the batch
        if len(inputs[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    layers[1].module.register_forward_pre_hook(refuse)
    found = trigger_activation_change(model, layers, clean, poisoned)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_map_that_cannot_see_the_trigger_has_no_change():
    model = Plain()
    clean, _ = pairs(3)
    layers = trace_conv_layers(model, clean[:1])
    assert not trigger_activation_change(model, layers, clean, clean).any()


def test_the_model_is_left_as_it_was_found():
    model = Plain().train()
    clean, poisoned = pairs(2)
    layers = trace_conv_layers(model, clean[:1])
    running = model.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    trigger_activation_change(model, layers, clean, poisoned)
    with pytest.raises(RuntimeError):
        trigger_activation_change(model, layers, clean[:, :2], poisoned[:, :2])
    assert model.training and all(not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.bn1.running_mean, running)  # type: ignore[arg-type]


LAYERS = [ConvLayer("a", nn.Conv2d(1, 4, 1)), ConvLayer("b", nn.Conv2d(1, 3, 1))]
TAC = torch.tensor([0.1, 0.4, 0.2, 0.3, 5.0, 7.0, 6.0])


def test_precision_counts_within_layers():
    chosen = torch.tensor([False, True, True, False, False, True, False])  # tops: 1, 3 of a; 5 of b
    found = precision_at(chosen, TAC, LAYERS)
    assert (found.hits, found.chosen) == (2, 3) and found.value == pytest.approx(2 / 3)
    assert found.random == pytest.approx((2 * 2 / 4 + 1 / 3) / 3)
    assert found.percentile == pytest.approx(((3.5 + 1.5) / 4 + 2.5 / 3) / 3)


def test_the_chance_is_that_of_all_choices_of_the_same_sizes():
    chosen = torch.tensor([False, True, True, False, False, True, False])
    found = precision_at(chosen, TAC, LAYERS)
    hits = [len({1, 3} & set(two)) + (one == 1) for two in itertools.combinations(range(4), 2) for one in range(3)]
    assert found.chance == pytest.approx(sum(h >= 2 for h in hits) / len(hits))
    assert found.random * 3 == pytest.approx(sum(hits) / len(hits))


def test_a_perfect_choice_and_an_empty_one():
    perfect = precision_at(torch.tensor([False, True, False, True, False, True, False]), TAC, LAYERS)
    assert perfect.value == 1 and perfect.percentile > 0.7
    empty = precision_at(torch.zeros(7, dtype=torch.bool), TAC, LAYERS)
    assert (empty.hits, empty.chosen) == (0, 0) and math.isnan(empty.value) and math.isnan(empty.random)


def test_images_without_counterparts_are_refused():
    clean, poisoned = pairs(2)
    with pytest.raises(ValueError, match="no pairs"):
        trigger_activation_change(Plain(), [], clean, poisoned[:1])
