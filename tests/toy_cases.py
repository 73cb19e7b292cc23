"""Toy networks with weights, images they classify, and what of a model a test compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalised(nn.Module):
    """Pixels in [0,1] -> the network behind a normalisation, as fmp_core.models.build.PixelModel."""

    def __init__(self, network: nn.Module, mean: float = 0.5, std: float = 0.25):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - self.mean) / self.std)


@torch.no_grad()
def toy_model(kind: type[nn.Module], images: Tensor, seed: int = 0) -> Normalised:
    """A ``kind`` in evaluation mode with random weights and batch norms, its head balanced so that ``images`` get several
    classes with small margins: an attack then changes some predictions, not none and not all."""
    generator = torch.Generator().manual_seed(seed)
    network = kind()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scale = module.weight[0].numel() ** -0.5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 1.5 * scale)
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
        elif isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            if module.affine:
                module.weight.copy_(0.5 + torch.rand(shape, generator=generator))
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.2)
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.2)
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    model = Normalised(network).eval()
    logits = model(images)
    network.head.bias -= logits.mean(0)
    return model


def toy_images(count: int = 12, seed: int = 0, size: int = 8) -> Tensor:
    """Pixels in [0,1], some of them exactly 0 or 1 so that clamping matters."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1000 + seed))
    return (noise * 1.3 - 0.15).clamp(0, 1)


def toy_case(kind: type[nn.Module], count: int = 12, seed: int = 0) -> tuple[Normalised, Tensor, Tensor]:
    """Model, images, and the model's own predictions as labels."""
    images = toy_images(count, seed)
    model = toy_model(kind, images, seed)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def footprint(model: nn.Module) -> tuple[dict[str, object], int]:
    """Everything a function could leave behind: training and gradient flags, gradients, and the number of hooks."""
    flags: dict[str, object] = {f"training {name}": module.training for name, module in model.named_modules()}
    flags |= {f"requires_grad {name}": parameter.requires_grad for name, parameter in model.named_parameters()}
    flags |= {f"grad {name}": parameter.grad is None for name, parameter in model.named_parameters()}
    hooks = 0
    for module in model.modules():
        for store in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks += len(getattr(module, store))
    return flags, hooks


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
