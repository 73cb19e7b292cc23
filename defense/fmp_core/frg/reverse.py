"""Feature Reverse Generation (paper, Algorithm 1, lines 15-21), batched over feature maps.

Images and perturbations are in pixel space [0,1]. For one step the gradient of ``|| f_i(x) - f_i(x0) ||^2`` at the noisy
image ``x0`` is a vector-Jacobian product whose vector is the difference of the two maps, zero outside channel ``i``: the clean
and the noisy forward pass are shared by all feature maps of the model, and only the backward pass is one per map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmp_core.models.fast_ops import ConvCall, FastOps
from fmp_core.models.feature_maps import ConvLayer


class _LayerReachedError(Exception):
    pass


def noisy_start(images: Tensor, eps: float, seed: int) -> Tensor:
    """``clamp(x + eps*noise, 0, 1)`` for ``images`` ``[B, C, H, W]``; the noise is U(-1, 1), the same on every device."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (images + eps * noise.to(images.device)).clamp(0, 1)


def fgsm(images: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """``clamp(x + eps*sign(gradient), 0, 1)``: lines 19-20 of Algorithm 1."""
    return torch.add(images, gradient.sign(), alpha=eps).clamp_(0, 1)


class FrgSettings(NamedTuple):
    """How FRG images are made: L-inf bound ``eps`` in pixel units, number of steps, size ``alpha`` of a step if there are
    several (default 2.5*eps/steps), and the seed of the start noise (one draw per image, shared by all maps)."""

    eps: float
    steps: int = 1
    alpha: float | None = None
    seed: int = 0

    @property
    def step_size(self) -> float:
        return 2.5 * self.eps / self.steps if self.alpha is None else self.alpha


class SharedForward:
    """The forward passes that all feature maps share, for ``copies`` stacked copies of a batch of images.

    The rows of the stacked batch are independent, so one backward pass answers for ``copies`` feature maps of a layer. Map
    differences and ReLU masks always come from ``model`` in float32; only the backward pass of the first
    step runs in ``dtype``.

    Args:
        model: frozen, float32, takes pixels in [0,1].
        layers: the layers of ``model`` whose maps get FRG images, in execution order; passes end with the last.
        images: clean, ``[B, C, H, W]`` in [0,1].
        start: the noisy images, same shape (:func:`noisy_start`).
        copies: feature maps per backward pass.
        low_precision: ``model`` :func:`~fmp_core.models.fast_ops.to_precision` to ``dtype``; by default ``model`` itself.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ConvLayer],
        images: Tensor,
        start: Tensor,
        copies: int = 1,
        low_precision: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.copies, self.rows = model, copies, len(images)
        self.images = _stack(images, copies)
        self.start = _stack(start, copies).requires_grad_()
        self.clean: dict[int, Tensor] = {}
        self.difference: dict[int, Tensor] = {}  # noisy - clean, [B, C, h, w]
        self.calls: dict[int, ConvCall] = {}
        weights = [layer.module.weight for layer in layers]
        masks: list[Tensor] = []

        def keep_clean(call: ConvCall, out: Tensor) -> None:
            self.clean[id(call.weight)] = out

        def keep_difference(call: ConvCall, out: Tensor) -> None:
            self.difference[id(call.weight)] = out - self.clean[id(call.weight)]

        with torch.no_grad():
            _forward(model, images, weights, keep_clean)
            _forward(model, start, weights, keep_difference, record=masks)

        backward_model = model if low_precision is None else low_precision
        original = {id(theirs): own for own, theirs in zip(backward_model.parameters(), model.parameters(), strict=True)}
        keys = {id(original[id(weight)]): id(weight) for weight in weights}

        def keep_call(call: ConvCall, _out: Tensor) -> None:
            self.calls[keys[id(call.weight)]] = call

        replay = (mask.repeat(copies, *[1] * (mask.dim() - 1)) for mask in masks)
        with torch.enable_grad():
            _forward(
                backward_model, self.start, [original[id(weight)] for weight in weights], keep_call, dtype=dtype, replay=replay
            )

    def gradient(self, layer: ConvLayer, channels: Sequence[int]) -> Tensor:
        """Gradient of each copy's loss at the noisy images, ``[copies*B, C, H, W]``; copy ``j`` is for ``channels[j]``."""
        key = id(layer.module.weight)
        call, difference = self.calls[key], self.difference[key]
        parts = {channel: _through_one_channel(call, difference[:, channel], channel) for channel in set(channels)}
        into = torch.cat([parts[channel] for channel in channels])
        return torch.autograd.grad(call.input, self.start, into, retain_graph=True)[0].detach()

    def reversed_images(self, layer: ConvLayer, channels: Sequence[int], settings: FrgSettings) -> Tensor:
        """FRG images of ``channels`` (one per copy), ``[copies*B, C, H, W]`` in [0,1].

        One step is Algorithm 1. More are projected gradient steps of size ``settings.step_size`` from the noisy start, kept in
        the eps-ball around the clean image and in [0,1].
        """
        eps = settings.eps
        gradient = self.gradient(layer, channels)
        if settings.steps == 1:
            return fgsm(self.images, gradient, eps)
        low, high = (self.images - eps).clamp(0, 1), (self.images + eps).clamp(0, 1)
        current = self.start.detach()
        for step in range(settings.steps):
            if step > 0:
                gradient = self._gradient_at(current, layer, channels)
            current = torch.minimum(torch.maximum(current + settings.step_size * gradient.sign(), low), high)
        return current

    def _gradient_at(self, images: Tensor, layer: ConvLayer, channels: Sequence[int]) -> Tensor:
        """As :meth:`gradient`, at other images than the shared start: a forward pass up to the layer, and back."""
        images = images.detach().requires_grad_()
        clean = self.clean[id(layer.module.weight)]
        reached: list[tuple[ConvCall, Tensor]] = []
        with torch.enable_grad():
            _forward(self.model, images, [layer.module.weight], lambda *call: reached.append(call))
        call, out = reached[0][0], reached[0][1].detach()
        rows = [slice(copy * self.rows, (copy + 1) * self.rows) for copy in range(self.copies)]
        parts = [_through_one_channel(call, out[r, c] - clean[:, c], c) for r, c in zip(rows, channels, strict=True)]
        return torch.autograd.grad(call.input, images, torch.cat(parts))[0].detach()


def _forward(
    net: nn.Module, batch: Tensor, weights: Sequence[Tensor], on_call: Callable[[ConvCall, Tensor], None], **frozen: Any
) -> None:
    """One forward pass that ends with the convolution of the last of ``weights``; ``on_call`` gets each one's call and output.

    ``frozen``: arguments of :class:`~fmp_core.models.fast_ops.FastOps`.
    """

    def call_then_stop(call: ConvCall, out: Tensor) -> None:
        on_call(call, out)
        if call.weight is weights[-1]:
            raise _LayerReachedError

    with suppress(_LayerReachedError), FastOps(on_convolution={id(weight): call_then_stop for weight in weights}, **frozen):
        net(batch)


def _stack(images: Tensor, copies: int) -> Tensor:
    return images.repeat(copies, 1, 1, 1).contiguous(memory_format=torch.channels_last)


def _through_one_channel(call: ConvCall, difference: Tensor, channel: int) -> Tensor:
    """Gradient of ``||difference||^2`` of one output channel with respect to the convolution's input, ``[B, inputs, H, W]``.

    ``difference`` is ``[B, h, w]``. Only one filter takes part, which makes this as many times cheaper than a backward pass
    through the whole convolution as it has channels. The factor 2 is left out: only signs are used.
    """
    per_group = call.weight.shape[1]
    group = channel // (call.weight.shape[0] // call.groups)
    inputs = call.input[: len(difference), group * per_group : (group + 1) * per_group]
    part = torch.ops.aten.convolution_backward(
        difference.unsqueeze(1).to(call.input.dtype),
        inputs,
        call.weight[channel : channel + 1],
        None,
        call.stride,
        call.padding,
        call.dilation,
        False,
        (0, 0),
        1,
        (True, False, False),
    )[0]
    if call.groups == 1:
        return part
    whole = part.new_zeros(len(part), call.input.shape[1], *part.shape[2:])
    whole[:, group * per_group : (group + 1) * per_group] = part
    return whole
