"""One change, common to all clean images, that flips their predictions to one class (not in the paper).

The paper generates, for each feature map, a perturbation of each image's own. A backdoor trigger is the same on every image and
flips all predictions to the same class, so inversion (as in Neural Cleanse, Wang et al. 2019) searches for the smallest common
change that does: few pixels for a patch, a few grey levels for a pattern that covers the image, a pixel's way for a warp. No
poisoned image takes part. docs/experiments/strong.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.errors import UserError
from fmp_core.inversion.warp import CONTROL_POINTS, smooth_field, warped
from fmp_core.models.evaluate import to_unit
from fmp_core.models.fast_ops import FastOps
from fmp_core.storage.files import write_torch
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system.devices import by_batch

# Bound of a change by family, in the order they are tried: the smallest of each kind first. ``sparse`` sets a few pixels to 0
# or 1; ``dense-8`` changes every pixel by at most 8 of 255 grey levels; ``warp-1`` moves control points by one pixel per axis,
# of images below 32x32 by 1/32 of their side.
WARPS, WARP_SIDE = {"warp-1": 1.0}, 32
FAMILIES = {"dense-4": 4 / 255, "sparse": 1.0, "dense-8": 8 / 255, "dense-16": 16 / 255, "dense-32": 32 / 255, **WARPS}
INVERTED_TRIGGER = "reversed_trigger.pt"  # in the result folder
STEPS = 16  # gradient steps
SPARSE_BATCH, DENSE_BATCH = 256, 64  # clean images per step; with fewer, the choice of pixels goes astray
QUICK, QUICK_WARP = (4, 2), (1, 8)  # a quick inversion divides steps, and images of each, by these; warps need all steps
ALL_TO_ALL = -1  # a target: of each image the class after its own, the last's being the first (BB's all2all)
SPARSE_PART = 64  # a sparse trigger has at most 1/64 of the pixels: 16 of 32x32, as many as a 4x4 patch
Batch = tuple[Tensor, Tensor]  # images [B, C, H, W] and their labels int64 [B]


@dataclass(frozen=True)
class InvertedTrigger:
    """A change of one of the :data:`FAMILIES` towards class ``target``, or :data:`ALL_TO_ALL`.

    ``sparse`` sets the pixels of the mask ``where`` (bool ``[1, 1, H, W]``) to ``values`` (``[1, C, H, W]``, each 0 or 1); the
    dense families add ``values`` to all pixels; for a warp they are displacements (``[1, 2, H, W]``, :func:`~.warp.warped`).
    """

    family: str
    target: int
    values: Tensor
    where: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """``images`` ``[B, C, H, W]`` in [0,1] with the trigger; channels last."""
        if self.family in WARPS:
            changed = warped(images, self.values)
        elif self.family == "sparse":
            changed = torch.where(self.where, self.values, images)
        else:
            changed = (images + self.values).clamp(0, 1)
        return changed.contiguous(memory_format=torch.channels_last)


def targets_of(rates: int) -> list[int]:
    """The target of each of so many flip rates of a verdict: every class in its place, last :data:`ALL_TO_ALL`."""
    return [*range(rates - 1), ALL_TO_ALL]


def wanted_classes(target: int, labels: Tensor, num_classes: int) -> Tensor:
    """The attacker's class of each image, int64 like ``labels``."""
    return (labels + 1) % num_classes if target == ALL_TO_ALL else torch.full_like(labels, target)


def invert_trigger(
    network: nn.Module, dtype: torch.dtype, clean: Batch, family: str, target: int, seed: int, quick: bool = False
) -> InvertedTrigger:
    """The trigger of ``family`` that at most :data:`STEPS` gradient steps find, each on a batch drawn by ``seed``.

    A sparse one is that of the step at which it flipped most predictions, with the fewest pixels.

    Args:
        network: frozen, takes pixels in [0,1]; what :func:`~.fast_ops.to_precision` makes of a model for ``dtype``.
        clean: images uint8 ``[M, C, H, W]`` and their labels; those of class ``target`` are left out, others there must be.
        quick: fewer and longer steps, or the same steps of a warp, on smaller batches; a rough trigger for about an eighth of
            the time.
    """
    fewer_steps, fewer_images = (QUICK_WARP if family in WARPS else QUICK) if quick else (1, 1)
    steps = max(1, STEPS // fewer_steps)
    generator = torch.Generator().manual_seed(seed)
    images, labels = clean
    others = (labels != target).nonzero().flatten()
    channels, height, width = images.shape[1:]
    values = torch.zeros((1, channels, height, width), device=images.device)
    where = torch.zeros((1, 1, height, width), dtype=torch.bool, device=images.device)
    trigger, eps = InvertedTrigger(family, target, values, where), FAMILIES[family]

    def draw_batch(count: int) -> Batch:
        drawn = torch.randint(len(others), (max(1, count // fewer_images),), generator=generator)
        rows = others[drawn.to(images.device)]
        return to_unit(images[rows]), labels[rows]

    if family == "sparse":
        return _grow_sparse(network, dtype, trigger, draw_batch, steps)
    if family in WARPS:
        return _bend(network, dtype, trigger, draw_batch, steps)
    for _ in range(steps):
        batch, own = draw_batch(DENSE_BATCH)
        gradient = _flips_and_gradient(network, dtype, trigger.apply(batch), target, own)[1]
        step = 2.5 * eps / steps * gradient.sum(0, keepdim=True).sign()
        trigger = replace(trigger, values=(trigger.values - step).clamp(-eps, eps))
    return trigger


def _grow_sparse(
    network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, draw_batch: Callable[[int], Batch], steps: int
) -> InvertedTrigger:
    """Add pixels to ``trigger`` step by step; the first of the triggers that flipped most predictions."""
    best, most_flipped = trigger, -1
    for step in range(steps + 1):
        batch, own = draw_batch(SPARSE_BATCH)
        pixels = trigger.apply(batch)
        flips, gradient = _flips_and_gradient(network, dtype, pixels, trigger.target, own, with_gradient=step < steps)
        flipped = int(flips.sum())
        if flipped > most_flipped:
            best, most_flipped = trigger, flipped
        if flipped == len(pixels) or step == steps:
            break
        trigger = _with_more_pixels(trigger, pixels, gradient, steps)
    return best


def _bend(
    network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, draw_batch: Callable[[int], Batch], steps: int
) -> InvertedTrigger:
    """A warp after ``steps`` signed steps of its control points."""
    height, width = trigger.where.shape[2:]
    bound = FAMILIES[trigger.family] * min(1.0, min(height, width) / WARP_SIDE)
    control = torch.zeros(1, 2, CONTROL_POINTS, CONTROL_POINTS, device=trigger.where.device)
    for _ in range(steps):
        batch, own = draw_batch(DENSE_BATCH)
        with torch.enable_grad():
            moved = replace(trigger, values=smooth_field(control.requires_grad_(), height, width)).apply(batch)
        gradient = _flips_and_gradient(network, dtype, moved.detach(), trigger.target, own)[1]
        (slope,) = torch.autograd.grad(moved, control, gradient)
        control = (control.detach() - 2.5 * bound / steps * slope.sign()).clamp(-bound, bound)
    return replace(trigger, values=smooth_field(control, height, width))


def _flips_and_gradient(
    network: nn.Module, dtype: torch.dtype, pixels: Tensor, target: int, labels: Tensor, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Which images, of the classes ``labels``, are classified as the attacker wants, bool ``[B]``; and the gradient of each
    one's loss towards that with respect to its ``pixels``, float32, 0 unless ``with_gradient``."""

    def work(part: slice) -> tuple[Tensor, Tensor]:
        leaf = pixels[part].requires_grad_()
        with torch.enable_grad():
            with FastOps(dtype):
                logits = network(leaf).float()
            wanted = wanted_classes(target, labels[part], logits.shape[1])
            loss = F.cross_entropy(logits, wanted, reduction="sum")
        gradient = torch.autograd.grad(loss, leaf)[0].float() if with_gradient else torch.zeros_like(leaf)
        return logits.argmax(1) == wanted, gradient

    flips, gradients = zip(*by_batch(len(pixels), len(pixels), pixels.device, work), strict=True)
    return torch.cat(flips), torch.cat(gradients)


def _with_more_pixels(trigger: InvertedTrigger, pixels: Tensor, gradient: Tensor, steps: int) -> InvertedTrigger:
    """``trigger`` with those pixels set to 0 or 1 that lower the loss most, to first order, summed over images and channels.

    A pixel that is set already may be set to its other value; once 1/64 of the pixels are set, no other is.
    """
    to_zero, to_one = (gradient * pixels).sum(0).flatten(1), -(gradient * (1 - pixels)).sum(0).flatten(1)
    decrease = torch.maximum(to_zero, to_one).sum(0)
    most = max(1, decrease.numel() // SPARSE_PART)
    values, where = trigger.values.clone(), trigger.where.clone()
    count, left = -(-most // steps), most - int(where.sum())
    if left:
        count = min(count, left)
    else:
        decrease = decrease.masked_fill(~where.view(-1), -torch.inf)
    chosen = decrease.topk(count).indices
    values.view(len(to_one), -1)[:, chosen] = (to_one > to_zero).float()[:, chosen]
    where.view(-1)[chosen] = True
    return replace(trigger, values=values, where=where)


def flip_rate(
    network: nn.Module, dtype: torch.dtype, trigger: InvertedTrigger, clean: Batch, before: Tensor
) -> tuple[float, float]:
    """Share of ``clean`` images (uint8, none of the target class; with their labels) whose prediction the trigger changes to
    the attacker's class, and the mean probability of that class; 0 for no images. ``before``: the predictions without it, int64
    ``[B]``."""
    images, labels = clean
    if not len(images):
        return 0.0, 0.0
    logits = logits_of(network, dtype, images, trigger)
    wanted = wanted_classes(trigger.target, labels, logits.shape[1])
    flipped = (logits.argmax(1) == wanted) & (before != wanted)
    return float(flipped.double().mean()), float(logits.double().softmax(1).gather(1, wanted[:, None]).mean())


def logits_of(network: nn.Module, dtype: torch.dtype, images: Tensor, trigger: InvertedTrigger | None = None) -> Tensor:
    """Logits float32 ``[B, K]`` of uint8 ``images`` ``[B, C, H, W]``, with the trigger if there is one."""

    def work(part: slice) -> Tensor:
        pixels = to_unit(images[part])
        return network(trigger.apply(pixels) if trigger else pixels).float()

    with torch.inference_mode(), FastOps(dtype):
        return torch.cat(by_batch(len(images), DENSE_BATCH, images.device, work))


def save_trigger(path: Path, trigger: InvertedTrigger) -> None:
    """Write the trigger, whole or not at all."""
    write_torch(path, {**asdict(trigger), "values": trigger.values.cpu(), "where": trigger.where.cpu()})


def load_trigger(path: Path, image_shape: Sequence[int]) -> InvertedTrigger:
    """Read what :func:`save_trigger` wrote, for images ``[C, H, W]``, on the CPU.

    Raises:
        UserError: there is none, or it is damaged or for other images.
    """
    content = load_torch_file(path)
    channels, height, width = image_shape
    try:
        planes = 2 if content["family"] in WARPS else channels
        shapes = {"values": (torch.float32, (1, planes, height, width)), "where": (torch.bool, (1, 1, height, width))}
        good = content["family"] in FAMILIES and isinstance(content["target"], int)
        good &= all((content[name].dtype, tuple(content[name].shape)) == shape for name, shape in shapes.items())
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path} is not an inverted trigger for images of {channels}x{height}x{width}; run the defense again.")
    return InvertedTrigger(**{name: content[name] for name in ("family", "target", "values", "where")})
