"""Feature Reverse Generation (paper, Algorithm 1, lines 15-21), batched over feature maps.

All images and perturbations are in pixel space [0,1]. For one step the gradient of ``|| f_i(x) - f_i(x0) ||^2`` at the noisy
image ``x0`` is a vector-Jacobian product whose vector is the difference of the two maps, zero outside channel ``i``: the clean
and the noisy forward pass are shared by all feature maps of the model, and only the backward pass is one per map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .feature_maps import ConvLayer, captured


class _LayerReachedError(Exception):
    pass


def noisy_start(images: Tensor, noise: Tensor, eps: float) -> Tensor:
    """``clamp(x + eps*noise, 0, 1)``; ``noise`` is U(-1, 1), shaped like ``images`` ``[B, C, H, W]``."""
    return (images + eps * noise).clamp(0, 1)


def fgsm(images: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """``clamp(x + eps*sign(gradient), 0, 1)``: lines 19-20 of Algorithm 1."""
    return (images + eps * gradient.sign()).clamp(0, 1)


class SharedForward:
    """The forward passes that all feature maps share, for ``copies`` stacked copies of a batch of images.

    The rows of the stacked batch are independent, so one backward pass answers for ``copies`` feature maps of a layer.

    Args:
        model: frozen, takes pixels in [0,1].
        layers: the layers whose maps will be asked for.
        images: clean, ``[B, C, H, W]`` in [0,1].
        start: the noisy images, same shape (:func:`noisy_start`).
        copies: feature maps per backward pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ConvLayer], images: Tensor, start: Tensor, copies: int):
        self.model, self.copies, self.rows = model, copies, len(images)
        self.images = images.repeat(copies, 1, 1, 1)
        with captured(layers) as maps, torch.no_grad():
            model(images)
        self.clean = dict(maps)
        self.start = start.repeat(copies, 1, 1, 1).requires_grad_()
        with captured(layers) as maps, torch.enable_grad():
            model(self.start)
        self.noisy = dict(maps)

    def gradient(self, layer: ConvLayer, channels: Sequence[int]) -> Tensor:
        """Gradient of each copy's loss at the noisy images, ``[copies*B, C, H, W]``; copy ``j`` asks for ``channels[j]``."""
        noisy, clean = self.noisy[layer.name], self.clean[layer.name]
        seed = torch.zeros_like(noisy)
        for copy, channel in enumerate(channels):
            rows = slice(copy * self.rows, (copy + 1) * self.rows)
            seed[rows, channel] = 2 * (noisy.detach()[rows, channel] - clean[:, channel])
        return torch.autograd.grad(noisy, self.start, seed, retain_graph=True)[0]

    def reversed_images(self, layer: ConvLayer, channels: Sequence[int], eps: float, steps: int, alpha: float) -> Tensor:
        """FRG images of ``channels`` (one per copy), ``[copies*B, C, H, W]`` in [0,1].

        One step is Algorithm 1. More are projected gradient steps of size ``alpha`` from the noisy start, kept in the eps-ball
        around the clean image and in [0,1].
        """
        gradient = self.gradient(layer, channels)
        if steps == 1:
            return fgsm(self.images, gradient, eps)
        low, high = (self.images - eps).clamp(0, 1), (self.images + eps).clamp(0, 1)
        current = self.start.detach()
        for step in range(steps):
            if step > 0:
                gradient = self._gradient_at(current, layer, channels)
            current = torch.minimum(torch.maximum(current + alpha * gradient.sign(), low), high)
        return current

    def _gradient_at(self, images: Tensor, layer: ConvLayer, channels: Sequence[int]) -> Tensor:
        """As :meth:`gradient`, at other images than the shared start: a forward pass up to the layer, and back."""
        images = images.detach().requires_grad_()
        reached: list[Tensor] = []

        def stop(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            reached.append(output)
            raise _LayerReachedError

        handle = layer.module.register_forward_hook(stop)
        try:
            with torch.enable_grad():
                self.model(images)
        except _LayerReachedError:
            pass
        finally:
            handle.remove()
        rows = [slice(copy * self.rows, (copy + 1) * self.rows) for copy in range(self.copies)]
        pairs = zip(rows, channels, strict=True)
        with torch.enable_grad():
            loss = torch.stack([(self.clean[layer.name][:, c] - reached[0][r, c]).square().sum() for r, c in pairs]).sum()
            return torch.autograd.grad(loss, images)[0]
