"""Algorithm 1 as the paper prints it: one feature map at a time, and nothing shared between maps.

Slow on purpose. For each feature map: two full forward passes, one backward pass through the plain loss
``|| f_i(x) - f_i(x0) ||^2``, and one inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fmp_core.models.feature_maps import ConvLayer
from torch import Tensor, nn


@dataclass
class Reference:
    """``margins`` float64 ``[N, M]``: true-class logit minus the best other, per feature map and image; the image counts as
    correct where it is positive. ``images`` ``[N, M, C, H, W]``: what FRG made. ``gradients``: of its first step."""

    margins: Tensor
    images: Tensor
    gradients: Tensor

    @property
    def correct(self) -> Tensor:
        return (self.margins > 0).sum(1)


def feature_map(model: nn.Module, conv: nn.Module, channel: int, x: Tensor) -> Tensor:
    """``f_i(x)``, ``[M, H, W]``."""
    found: list[Tensor] = []
    # The clone, and the model going on with another one, keep in-place operations away from what was found.
    handle = conv.register_forward_hook(lambda _module, _inputs, output: found.append(output[:, channel].clone()))
    try:
        model(x)
    finally:
        handle.remove()
    return found[0]


def gradient(model: nn.Module, conv: nn.Module, channel: int, x: Tensor, x0: Tensor) -> Tensor:
    """Lines 17-18: the gradient, at ``x0``, of ``|| f_i(x) - f_i(x0) ||^2``."""
    x0 = x0.clone().requires_grad_()
    loss = (feature_map(model, conv, channel, x) - feature_map(model, conv, channel, x0)).square().sum()
    loss.backward()
    assert x0.grad is not None
    return x0.grad


def start(images: Tensor, eps: float, seed: int) -> Tensor:
    """Line 16: the noisy image."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (images + eps * noise).clamp(0, 1)


def score(
    model: nn.Module,
    layers: list[ConvLayer],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 1,
    alpha: float | None = None,
    seed: int = 0,
) -> Reference:
    """Lines 1-11 for every feature map. ``model`` must be in evaluation mode."""
    assert not model.training
    alpha = 2.5 * eps / steps if alpha is None else alpha
    noisy = start(images, eps, seed)
    margins, reversed_images, gradients = [], [], []
    for layer in layers:
        for channel in range(layer.module.out_channels):
            first = gradient(model, layer.module, channel, images, noisy)
            if steps == 1:
                made = (images + eps * first.sign()).clamp(0, 1)
            else:
                made = noisy
                for _ in range(steps):
                    slope = gradient(model, layer.module, channel, images, made)
                    made = made + alpha * slope.sign()
                    made = images + (made - images).clamp(-eps, eps)
                    made = made.clamp(0, 1)
            with torch.no_grad():
                logits = model(made).double()
            others = logits.clone()
            others[torch.arange(len(labels)), labels] = -torch.inf
            margins.append(logits[torch.arange(len(labels)), labels] - others.amax(1))
            reversed_images.append(made)
            gradients.append(first)
    model.zero_grad(set_to_none=True)
    return Reference(torch.stack(margins), torch.stack(reversed_images), torch.stack(gradients))
