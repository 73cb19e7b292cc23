"""A pruned feature map contributes exactly nothing, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.models.pruning import accuracy_without, prune_feature_maps
from torch import Tensor, nn
from toy import NETS, Depthwise, InplaceSum, OutOfOrder, Plain, PreActivation, SmallPreActResNet, TwoWriters
from toy_cases import footprint, same, toy_case, weights


def every_second(layers: list[ConvLayer]) -> dict[str, Tensor]:
    return {layer.name: torch.arange(layer.channels) % 2 == 1 for layer in layers}


def outputs(model: nn.Module, modules: list[nn.Module], images: Tensor) -> list[Tensor]:
    """What the modules return during one pass, in the order of their calls."""
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _i, out: found.append(out.detach().clone())) for m in modules]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_pruned_map_and_its_own_batch_norm_are_exactly_zero(kind: type[nn.Module], training: bool) -> None:
    model, images, _ = toy_case(kind)
    layers = trace_conv_layers(model.network, images)
    chosen = every_second(layers)
    prune_feature_maps(layers, chosen)
    model.train(training)
    for layer in layers:
        found = outputs(model, [layer.module, *layer.batch_norms], images)
        assert len(found) >= 1 + len(layer.batch_norms)
        for output in found:
            assert (output[:, chosen[layer.name]] == 0).all()
            assert (output[:, ~chosen[layer.name]] != 0).any((0, 2, 3)).all()


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_only_the_chosen_rows_change(kind: type[nn.Module]) -> None:
    model, images, _ = toy_case(kind)
    layers = trace_conv_layers(model.network, images)
    chosen = every_second(layers)
    expected = weights(model.network)
    names = {module: name for name, module in model.network.named_modules()}
    for layer in layers:
        for module in (layer.module, *layer.batch_norms):
            for part in ("weight", "bias"):
                key = f"{names[module]}.{part}"
                if key in expected:
                    expected[key][chosen[layer.name]] = 0
    prune_feature_maps(layers, chosen)
    actual = model.network.state_dict()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_a_batch_norm_after_a_sum_or_of_two_convs_is_left_alone() -> None:
    for kind, name in ((PreActivation, "last"), (InplaceSum, "bn"), (TwoWriters, "bn")):
        model, images, _ = toy_case(kind)
        norm = model.network.get_submodule(name)
        before = weights(norm)
        layers = trace_conv_layers(model.network, images)
        prune_feature_maps(layers, {layer.name: torch.ones(layer.channels, dtype=torch.bool) for layer in layers})
        assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())


def test_a_pruned_map_no_longer_reaches_the_logits() -> None:
    """What the pruned filter would have seen cannot matter: other weights in its place give the same logits."""
    model, images, _ = toy_case(Plain)
    layers = trace_conv_layers(model.network, images)
    prune_feature_maps(layers, {"conv1": torch.tensor([False, False, True, False, False]), "conv2": torch.zeros(6).bool()})
    with torch.no_grad():
        before = model(images)
        model.network.conv2.weight[:, 2] = 1e6  # how conv2 reads the pruned map
        assert torch.equal(model(images), before)
        model.network.conv2.weight[:, 1] = 1e6
        assert not torch.equal(model(images), before)


def test_a_depthwise_filter_is_one_row() -> None:
    model, images, _ = toy_case(Depthwise)
    layers = trace_conv_layers(model.network, images)
    chosen = {layer.name: torch.zeros(6, dtype=torch.bool) for layer in layers}
    chosen["depthwise"][4] = True
    expand = model.network.expand.weight.clone()
    prune_feature_maps(layers, chosen)
    assert torch.equal(model.network.expand.weight, expand)
    assert model.network.depthwise.weight.abs().sum((1, 2, 3)).eq(0).tolist() == [False, False, False, False, True, False]


def test_pruning_nothing_changes_nothing() -> None:
    model, images, _ = toy_case(OutOfOrder)
    before = weights(model)
    layers = trace_conv_layers(model.network, images)
    prune_feature_maps(layers, {layer.name: torch.zeros(layer.channels, dtype=torch.bool) for layer in layers})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_pruned_parameters_can_still_be_trained() -> None:
    model, images, labels = toy_case(Plain)
    layers = trace_conv_layers(model.network, images)
    prune_feature_maps(layers, every_second(layers))
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


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


def test_a_batch_norm_without_weights_is_silenced_too() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean = torch.randn(4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.LazyLinear(2)).eval()
    images = torch.rand(2, 3, 8, 8)
    network(images)
    layers = trace_conv_layers(network, images)
    before = norm.running_mean.clone()
    accuracy_without(network, layers, {"0": torch.tensor([True, False, True, False])}, images.byte(), torch.zeros(2).long())
    assert torch.equal(norm.running_mean, before)  # only tried
    prune_feature_maps(layers, {"0": torch.tensor([True, False, True, False])})
    out = network[:2](images)
    assert (out[:, [0, 2]] == 0).all() and (out[:, [1, 3]] != 0).any()
