"""Which modules produce feature maps, in execution order, and which batch norm belongs to which convolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fmp_core.errors import UserError


@dataclass(frozen=True)
class ConvLayer:
    """A Conv2d; its output channels are its feature maps.

    ``batch_norms`` are those that consume exactly this convolution's output, and nothing else's. ``name`` is its path in the
    network.
    """

    name: str
    module: nn.Conv2d
    batch_norms: tuple[nn.Module, ...] = ()

    @property
    def channels(self) -> int:
        return self.module.out_channels


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients, restored on exit, also after an exception."""
    training = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def trace_conv_layers(network: nn.Module, example: Tensor) -> list[ConvLayer]:
    """Run ``network`` once on ``example`` ``[B, C, H, W]`` and list the Conv2d layers it calls, in execution order.

    A batch norm belongs to a convolution if every call of it received the very tensor that convolution returned, unchanged
    since: the batch norm after a residual sum belongs to none, even where the sum was made in place.

    A convolution whose output is the network's, but for operations without weights (pooling, ReLU, dropout, ...), is left out:
    its channels are class scores, not feature maps (SqueezeNet ends so).

    Raises:
        UserError: the model has no feature map; its maps would be ambiguous (a convolution is called more than once, or shares
            its weight with another); a convolution computes its weight, so that nothing could be pruned; or a batch norm has
            no running statistics, so that predictions depend on the batch.
    """
    _refuse_unusual(network)
    produced: list[tuple[nn.Conv2d, Tensor, int]] = []  # output kept alive, so identity holds; its version when returned
    consumed: dict[nn.Module, list[nn.Conv2d | None]] = {}
    origins: dict[Any, nn.Conv2d] = {}

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        produced.append((module, output, output._version))
        origins[output.grad_fn] = module  # kept now: an operation in place gives the tensor another one

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        source = next((conv for conv, out, version in produced if out is inputs[0] and out._version == version), None)
        consumed.setdefault(module, []).append(source)

    with contextlib.ExitStack() as hooks, frozen(network), torch.enable_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(after_conv))
            elif isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(before_norm))
        image = example.detach().requires_grad_()
        network.requires_grad_(True)  # the graph of operations then shows where weights come in
        out = network(image.clone())
        last = _output_layers(out if isinstance(out, Tensor) else out.logits, origins, image)

    names = {module: name for name, module in network.named_modules()}
    convs = [conv for conv, _, _ in produced]
    if not set(convs) - last:
        raise UserError("The model has no Conv2d layer before its output, so it has no feature maps that FMP could rank.")
    repeated = next((names[conv] for conv in convs if convs.count(conv) > 1), None)
    if repeated is not None:
        raise UserError(f"The model calls the convolution {repeated} more than once; FMP needs one feature map per channel.")
    owners = {norm: sources[0] for norm, sources in consumed.items() if len(set(sources)) == 1}
    return [
        ConvLayer(names[conv], conv, tuple(norm for norm, owner in owners.items() if owner is conv))
        for conv in convs
        if conv not in last
    ]


def _refuse_unusual(network: nn.Module) -> None:
    weights: dict[int, str] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if module._parameters.get("weight") is None:
                raise UserError(f"The convolution {name} computes its weight (weight norm, say), so its maps cannot be pruned.")
            if (other := weights.setdefault(id(module.weight), name)) != name:
                raise UserError(f"The convolutions {other} and {name} share one weight; FMP needs one feature map per channel.")
        elif isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UserError(f"The batch norm {name} has no running statistics, so predictions depend on the batch.")


def _output_layers(out: Tensor, origins: Mapping[Any, nn.Conv2d], image: Tensor) -> set[nn.Conv2d]:
    """The convolutions from which ``out`` is made without further weights.

    Args:
        origins: the node of autograd's graph that each convolution's output came from.
        image: the leaf that the network was run on; every other leaf of the graph is a parameter.
    """
    found: set[nn.Conv2d] = set()
    depends: dict[Any, bool] = {None: False}  # whether a node's value depends on the image
    waiting = [out.grad_fn]
    while waiting:  # not recursive: graphs are thousands of nodes deep
        node = waiting[-1]
        sources = [source for source, _ in node.next_functions] if node is not None else []
        unknown = [source for source in sources if source not in depends]
        if node in depends or not unknown:
            waiting.pop()
            depends.setdefault(node, getattr(node, "variable", None) is image or any(depends[s] for s in sources))
        else:
            waiting += unknown
    waiting, seen = [out.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        sources = [source for source, _ in node.next_functions if source is not None]
        if node in origins:
            found.add(origins[node])
        elif all(depends[source] for source in sources):  # else weights come in here
            waiting += sources
    return found
