"""Which convolutions a network runs, in which order, and which batch norms are theirs."""

from __future__ import annotations

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.models.build import build_model
from fmp_core.models.feature_maps import frozen, trace_conv_layers
from torch import nn
from toy import (
    ConvTwice,
    Depthwise,
    InplaceRelu,
    InplaceSum,
    NoConv,
    NormTwiceOnOne,
    NormTwiceOnTwo,
    OutOfOrder,
    Plain,
    PostActivation,
    PreActivation,
    SmallPreActResNet,
    SumOfTwo,
    TwoReaders,
    TwoWriters,
)
from toy_cases import footprint, toy_images, weights

# net -> its convolutions in execution order, each with the batch norms that consume exactly its output
WIRING = {
    Plain: [("conv1", ["bn1"]), ("conv2", ["bn2"])],
    PreActivation: [("stem", ["bn1"]), ("conv1", ["bn2"]), ("conv2", [])],
    PostActivation: [("stem", ["bn0"]), ("conv1", ["bn1"]), ("conv2", ["bn2"]), ("last", ["bn3"])],
    TwoReaders: [("conv", ["left", "right"])],
    TwoWriters: [("left", []), ("right", [])],
    SumOfTwo: [("left", []), ("right", [])],
    InplaceRelu: [("conv1", []), ("conv2", [])],
    InplaceSum: [("stem", []), ("conv", [])],
    Depthwise: [("expand", ["bn1"]), ("depthwise", ["bn2"]), ("grouped", ["bn3"])],
    NormTwiceOnOne: [("conv", ["bn"])],
    NormTwiceOnTwo: [("conv", [])],
    OutOfOrder: [("conv_a", ["bn_a"]), ("conv_b", ["bn_b"]), ("shortcut", [])],
    SmallPreActResNet: [
        ("conv1", ["layer1.bn1"]),
        ("layer1.conv1", ["layer1.bn2"]),
        ("layer1.conv2", []),
        ("layer2.shortcut.0", []),
        ("layer2.conv1", ["layer2.bn2"]),
        ("layer2.conv2", []),
    ],
}


def wiring(network: nn.Module) -> list[tuple[str, list[str]]]:
    names = {module: name for name, module in network.named_modules()}
    return [
        (layer.name, sorted(names[norm] for norm in layer.batch_norms)) for layer in trace_conv_layers(network, toy_images(1))
    ]


@pytest.mark.parametrize("kind", WIRING, ids=lambda kind: kind.__name__)
def test_convs_in_execution_order_with_their_own_batch_norms(kind: type[nn.Module]) -> None:
    assert wiring(kind()) == WIRING[kind]


def test_a_layer_is_the_module_of_that_name() -> None:
    network = Depthwise()
    layers = trace_conv_layers(network, toy_images(1))
    assert [layer.module for layer in layers] == [network.expand, network.depthwise, network.grouped]
    assert [layer.channels for layer in layers] == [6, 6, 6]


def test_a_conv_that_is_never_run_has_no_feature_maps() -> None:
    network = Plain()
    network.spare = nn.Conv2d(3, 4, 1)
    assert wiring(network) == WIRING[Plain]


def test_a_conv_called_twice_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"convolution conv more than once"):
        trace_conv_layers(ConvTwice(), toy_images(1))


class Head(nn.Module):
    """Two convolutions; what lies behind the second is given."""

    def __init__(self, *behind: nn.Module):
        super().__init__()
        self.body, self.last, self.behind = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Sequential(*behind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(self.last(self.body(x).relu()))


POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "behind, is_output",
    [
        (POOL, True),
        ((nn.ReLU(inplace=True), *POOL), True),  # SqueezeNet's
        ((nn.Dropout(), nn.MaxPool2d(2), nn.LeakyReLU(), *POOL, nn.Softmax(1)), True),
        ((nn.BatchNorm2d(5), *POOL), False),
        ((*POOL, nn.Linear(5, 5)), False),
        ((nn.PReLU(), *POOL), False),
    ],
)
def test_a_convolution_that_gives_the_output_is_no_feature_layer(behind: tuple[nn.Module, ...], is_output: bool) -> None:
    expected = ["body"] if is_output else ["body", "last"]
    assert [layer.name for layer in trace_conv_layers(Head(*behind), toy_images(2))] == expected


def test_several_output_convolutions_are_all_left_out() -> None:
    """Class scores summed over two scales, as in fully convolutional networks."""
    network = Head()
    network.other = nn.Conv2d(6, 5, 1)
    network.forward = lambda x: network.last(network.body(x)).mean((2, 3)) + network.other(network.body(x)).amax((2, 3))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="body more than once"):
        trace_conv_layers(network, toy_images(1))

    def forward(x: torch.Tensor) -> torch.Tensor:
        shared = network.body(x)
        return network.last(shared).mean((2, 3)) + network.other(shared).amax((2, 3))

    network.forward = forward  # type: ignore[method-assign]
    assert [layer.name for layer in trace_conv_layers(network, toy_images(1))] == ["body"]


def test_squeezenets_classifier_is_its_output() -> None:
    network = build_model("squeezenet1_0", 10)
    layers = trace_conv_layers(network, torch.rand(1, 3, 32, 32))
    assert layers[-1].name == "features.12.expand3x3" and sum(layer.channels for layer in layers) == 2976


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(UserError, match="no Conv2d"):
        trace_conv_layers(NoConv(), toy_images(1))


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_no_trace(training: bool) -> None:
    network = PreActivation().train(training)
    network.stem.weight.requires_grad_(False)
    before, state = footprint(network), weights(network)
    trace_conv_layers(network, toy_images(2))
    assert footprint(network) == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())  # batch norm statistics too


def test_tracing_leaves_no_trace_after_an_error() -> None:
    network = PreActivation().train()
    before = footprint(network)
    with pytest.raises(RuntimeError):
        trace_conv_layers(network, torch.rand(1, 7, 8, 8))  # 7 channels: the stem raises
    with pytest.raises(RuntimeError):
        trace_conv_layers(nn.Sequential(network, nn.Linear(3, 3)), toy_images(1))  # the layer after raises
    assert footprint(network) == before


def test_frozen_evaluates_without_gradients_and_restores_mixed_flags() -> None:
    network = Plain()
    network.bn1.eval()
    network.conv2.bias.requires_grad_(False)
    before = footprint(network)
    with frozen(network):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert footprint(network) == before
    with pytest.raises(KeyError), frozen(network):
        raise KeyError
    assert footprint(network) == before


def test_what_cannot_be_ranked_or_pruned_is_refused() -> None:
    """Two convolutions with one weight, a weight that is computed, a batch norm whose predictions depend on the batch."""
    images = toy_images(4)
    tied = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)
    )
    tied(images)
    tied[2].weight = tied[0].weight
    computed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.LazyLinear(2))
    computed(images)
    restless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.LazyLinear(2))
    restless(images)
    for network, says in (
        (tied, "0 and 2 share one weight"),
        (computed, "computes its weight"),
        (restless, "depend on the batch"),
    ):
        with pytest.raises(UserError, match=says):
            trace_conv_layers(network, images[:1])
