"""Which modules produce feature maps, in execution order, and which batch norm belongs to which convolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

    Raises:
        UserError: the model has no Conv2d, or calls one more than once (its maps would be ambiguous).
    """
    produced: list[tuple[nn.Conv2d, Tensor, int]] = []  # output kept alive, so identity holds; its version when returned
    consumed: dict[nn.Module, list[nn.Conv2d | None]] = {}

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        produced.append((module, output, output._version))

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        source = next((conv for conv, out, version in produced if out is inputs[0] and out._version == version), None)
        consumed.setdefault(module, []).append(source)

    handles = []
    try:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                handles.append(module.register_forward_hook(after_conv))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(before_norm))
        with frozen(network), torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()

    names = {module: name for name, module in network.named_modules()}
    convs = [conv for conv, _, _ in produced]
    if not convs:
        raise UserError("The model has no Conv2d layer, so it has no feature maps that FMP could rank.")
    repeated = next((names[conv] for conv in convs if convs.count(conv) > 1), None)
    if repeated is not None:
        raise UserError(f"The model calls the convolution {repeated} more than once; FMP needs one feature map per channel.")
    owners = {norm: sources[0] for norm, sources in consumed.items() if len(set(sources)) == 1}
    return [ConvLayer(names[conv], conv, tuple(norm for norm, owner in owners.items() if owner is conv)) for conv in convs]
