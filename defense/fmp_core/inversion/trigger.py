"""One perturbation, common to all clean images, that turns them to one class (not in the paper).

The paper reverses for each feature map a perturbation of each image's own. A backdoor's trigger is the same on every image and
turns all of them to the same label, so it is found where very little suffices to do that: few pixels for a patch, a few levels
for a pattern that covers the image. No poisoned image takes part. docs/strong.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.errors import UserError
from fmp_core.models.evaluate import to_unit
from fmp_core.models.fast_ops import FastOps
from fmp_core.storage.files import write_torch
from fmp_core.storage.torch_file import load_torch_file

# How far a perturbation may go, in the order they are asked: the least of each kind first. ``sparse`` sets a few pixels to
# 0 or 1; ``dense-8`` moves every pixel by at most 8 of 255 levels.
FAMILIES = {"dense-4": 4 / 255, "sparse": 1.0, "dense-8": 8 / 255, "dense-16": 16 / 255, "dense-32": 32 / 255}
INVERTED_TRIGGER = "reversed_trigger.pt"  # in the result folder
STEPS = 16
SPARSE_BATCH, DENSE_BATCH = 256, 64  # clean images per step; with fewer, the choice of pixels goes astray
SPARSE_PART = 64  # a sparse trigger takes 1/64 of the pixels: 16 of 32x32, as many as a 4x4 patch


@dataclass(frozen=True)
class InvertedTrigger:
    """A perturbation of one of the :data:`FAMILIES` towards class ``target``.

    ``sparse`` sets the pixels ``where`` (bool ``[1, 1, H, W]``) to ``values`` (``[1, C, H, W]``, each 0 or 1); the others add
    ``values`` to all pixels.
    """

    family: str
    target: int
    values: Tensor
    where: Tensor

    def on(self, images: Tensor) -> Tensor:
        """``images`` ``[B, C, H, W]`` in [0,1] with the perturbation; channels last."""
        made = torch.where(self.where, self.values, images) if self.family == "sparse" else (images + self.values).clamp(0, 1)
        return made.contiguous(memory_format=torch.channels_last)


def invert_trigger(
    network: nn.Module, dtype: torch.dtype, images: Tensor, family: str, target: int, seed: int
) -> InvertedTrigger:
    """The perturbation of ``family`` that at most :data:`STEPS` gradient steps find, each on images drawn by ``seed``.

    A sparse one is that of the step in which it turned most images, with the fewest pixels.

    Args:
        network: frozen, takes pixels in [0,1]; what :func:`~.fast_ops.to_precision` makes of a model for ``dtype``.
        images: uint8 ``[M, C, H, W]``, clean, none of class ``target``.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = images.shape[1:]
    values = torch.zeros((1, channels, height, width), device=images.device)
    where = torch.zeros((1, 1, height, width), dtype=torch.bool, device=images.device)
    trigger, eps = InvertedTrigger(family, target, values, where), FAMILIES[family]

    def drawn(count: int) -> Tensor:
        return to_unit(images[torch.randint(len(images), (count,), generator=generator).to(images.device)])

    if family == "sparse":
        return _fewest_pixels(network, dtype, trigger, drawn)
    for _ in range(STEPS):
        pixels, logits = _on(network, dtype, trigger, drawn(DENSE_BATCH))
        step = 2.5 * eps / STEPS * _gradient(logits, pixels, target).sum(0, keepdim=True).sign()
        trigger = replace(trigger, values=(trigger.values - step).clamp(-eps, eps))
    return trigger


def _fewest_pixels(
    network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, drawn: Callable[[int], Tensor]
) -> InvertedTrigger:
    """``trigger`` and up to :data:`STEPS` descendants with more pixels each: the first of those that turned most images."""
    best, turned_best = trigger, -1
    for step in range(STEPS + 1):
        pixels, logits = _on(network, dtype, trigger, drawn(SPARSE_BATCH))
        turned = int((logits.argmax(1) == trigger.target).sum())
        if turned > turned_best:
            best, turned_best = trigger, turned
        if turned == SPARSE_BATCH or step == STEPS:
            break
        trigger = _with_pixels(trigger, pixels.detach(), _gradient(logits, pixels, trigger.target))
    return best


def _on(network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, images: Tensor) -> tuple[Tensor, Tensor]:
    """``images`` with the trigger, a leaf, and their logits in float32."""
    pixels = trigger.on(images).requires_grad_()
    with torch.enable_grad(), FastOps(dtype):
        return pixels, network(pixels).float()


def _gradient(logits: Tensor, pixels: Tensor, target: int) -> Tensor:
    """Of the loss towards class ``target``, summed over images, with respect to the pixels; float32."""
    loss = F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device), reduction="sum")
    return torch.autograd.grad(loss, pixels)[0].float()


def _with_pixels(trigger: InvertedTrigger, pixels: Tensor, gradient: Tensor) -> InvertedTrigger:
    """With those pixels set to 0 or 1 that lower the loss most, to first order, summed over images and channels.

    They may be pixels that are set already, to the other side.
    """
    to_zero, to_one = (gradient * pixels).sum(0).flatten(1), -(gradient * (1 - pixels)).sum(0).flatten(1)
    worth = torch.maximum(to_zero, to_one).sum(0)
    chosen = worth.topk(max(1, worth.numel() // SPARSE_PART // STEPS)).indices
    values, where = trigger.values.clone(), trigger.where.clone()
    values.view(len(to_one), -1)[:, chosen] = (to_one > to_zero).float()[:, chosen]
    where.view(-1)[chosen] = True
    return replace(trigger, values=values, where=where)


def success(network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, images: Tensor) -> float:
    """Share of ``images`` (uint8, none of the target's class) that the trigger turns to its class; 0 if there are none."""
    if not len(images):
        return 0.0
    with torch.inference_mode(), FastOps(dtype):
        classes = torch.cat([network(trigger.on(to_unit(part))).argmax(1) for part in images.split(DENSE_BATCH)])
    return float((classes == trigger.target).double().mean())


def save_trigger(path: Path, trigger: InvertedTrigger) -> None:
    """Write the trigger, whole or not at all."""
    write_torch(path, {**asdict(trigger), "values": trigger.values.cpu(), "where": trigger.where.cpu()})


def load_trigger(path: Path, image_shape: Sequence[int]) -> InvertedTrigger:
    """The trigger :func:`save_trigger` wrote, for images ``[C, H, W]``, on the CPU.

    Raises:
        UserError: there is none, or it is damaged or for other images.
    """
    content = load_torch_file(path)
    channels, height, width = image_shape
    shapes = {"values": (torch.float32, (1, channels, height, width)), "where": (torch.bool, (1, 1, height, width))}
    try:
        good = content["family"] in FAMILIES and isinstance(content["target"], int)
        good &= all((content[name].dtype, tuple(content[name].shape)) == shape for name, shape in shapes.items())
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path} is not a inverted trigger for images of {channels}x{height}x{width}; run the defense again.")
    return InvertedTrigger(**{name: content[name] for name in ("family", "target", "values", "where")})
