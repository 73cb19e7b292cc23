"""The batches of a training epoch: which images, in which order, and how they are changed before the model sees them.

:class:`Crops` is BB's training transform; :class:`Mixup` and substitutes serve ``--preset strong``. All is drawn on the CPU, so
that no number depends on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmp_core.data.datasets import DatasetFacts
from fmp_core.models.evaluate import to_unit


@dataclass(frozen=True)
class Crops:
    """BB's training transform, drawn for ``B`` images: zero-pad by ``padding``, crop at ``shifts``, flip where ``mirrored``.

    ``shifts`` are int64 ``[B, 2, 1]`` (down, right) in 0..2*padding, ``mirrored`` is bool ``[B, 1]``. Applied to several
    batches, it moves their images alike.
    """

    padding: int
    shifts: Tensor
    mirrored: Tensor

    @staticmethod
    def draw(count: int, generator: torch.Generator, facts: DatasetFacts) -> Crops:
        """Draw for ``count`` images from a generator on the CPU."""
        shifts = torch.randint(0, 2 * facts.crop_padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        return Crops(facts.crop_padding, shifts.transpose(0, 1), mirrored & facts.flip)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` on the device of the draws -> the same, moved."""
        count, _, height, width = images.shape
        rows = self.shifts[:, 0] + torch.arange(height, device=images.device)
        columns = self.shifts[:, 1] + torch.arange(width, device=images.device)
        columns = torch.where(self.mirrored, columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4)
        picture = torch.arange(count, device=images.device)[:, None, None]
        return padded[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Mixup:
    """Mixup (Zhang et al., ICLR 2018): of an image and its partner in the batch one image is made, with the labels of both.

    ``partner``: int64 ``[B]``, a permutation of the batch. ``share``: float32 ``[B]`` in [0,1], the image's own share of its
    pixels and of its loss; 1 leaves it as it is.
    """

    partner: Tensor
    share: Tensor

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Mixup:
        """Draw for ``count`` images from a generator on the CPU; shares are uniform in [0,1]."""
        return Mixup(torch.randperm(count, generator=generator), torch.rand(count, generator=generator))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, C, H, W]`` in [0,1] -> the same, mixed."""
        return pixels[self.partner].lerp(pixels, self.share[:, None, None, None])

    def labels(self, labels: Tensor) -> Tensor:
        """int64 ``[B]`` -> the two classes that each mixed image shows, ``[B, 2]``; twice its own where the share is 1."""
        return torch.stack([labels, torch.where(self.share < 1, labels[self.partner], labels)], 1)


@dataclass(frozen=True)
class Batch:
    """Positions ``rows`` (int64 ``[B]``) of a batch's images in the training set, and how they are changed.

    ``substituted``: bool ``[B]``, whose substitutes the model sees; these are not mixed. None: there are no substitutes, or no
    mixing.
    """

    rows: Tensor
    crops: Crops
    substituted: Tensor | None
    mixup: Mixup | None

    def pixels(self, images: Tensor, substitutes: Tensor | None) -> tuple[Tensor, Tensor]:
        """From uint8 ``images`` and ``substitutes``, both ``[N, C, H, W]``, the model's pixels in [0,1], and the teacher's.

        A teacher sees no substitutes, but the images in their place, moved alike.
        """
        clean = to_unit(self.crops(images[self.rows]))
        if self.mixup is not None:
            clean = self.mixup(clean)
        if substitutes is None or self.substituted is None:
            return clean, clean
        carrying = to_unit(self.crops(substitutes[self.rows]))
        return torch.where(self.substituted[:, None, None, None], carrying, clean), clean

    def classes(self, labels: Tensor) -> Tensor:
        """The classes that each image shows, int64 ``[B, 1]``, of mixed ones ``[B, 2]``, from the ``labels`` of all images."""
        own = labels[self.rows]
        return own[:, None] if self.mixup is None else self.mixup.labels(own)

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The mean cross-entropy; of a mixed image that of its two :meth:`classes`, in their shares."""
        if self.mixup is None:
            return F.cross_entropy(logits, classes[:, 0])
        own, other = (F.cross_entropy(logits, wanted, reduction="none") for wanted in classes.unbind(1))
        return torch.lerp(other, own, self.mixup.share.to(own.dtype)).mean()


@dataclass(frozen=True)
class Plan:
    """What the batches of every epoch are drawn with.

    Args:
        batch_size: images per batch.
        parts: among how many GPUs a batch is split.
        substituted: share of the images to substitute; None if there are no substitutes.
        mixup: blend images that are not substituted in pairs.
        facts: of the dataset; they shape the crops.
    """

    batch_size: int
    parts: int
    substituted: float | None
    mixup: bool
    facts: DatasetFacts

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> list[Batch]:
        """The batches of an epoch over ``count`` images, on ``device``.

        Drawn batch by batch on the CPU, then moved all at once, so that a GPU waits for none of them.
        """
        positions = batches_of(count, self.batch_size, generator, self.parts)
        coins, crops, partners, shares = [], [], [], []
        for batch in positions:
            if self.substituted is not None:
                coins.append(torch.rand(len(batch), generator=generator) < self.substituted)
            crops.append(Crops.draw(len(batch), generator, self.facts))
            if self.mixup:
                pair = Mixup.draw(len(batch), generator)
                partners.append(pair.partner)
                shares.append(pair.share.masked_fill(coins[-1], 1) if coins else pair.share)

        def moved(parts: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.cat(parts).to(device).split([len(part) for part in parts])

        shifts, mirrored = moved([crop.shifts for crop in crops]), moved([crop.mirrored for crop in crops])
        there = map(Crops, [self.facts.crop_padding] * len(crops), shifts, mirrored)
        chosen = moved(coins) if coins else [None] * len(positions)
        mixed = map(Mixup, moved(partners), moved(shares)) if partners else [None] * len(positions)
        return [Batch(*drawn) for drawn in zip(moved(positions), there, chosen, mixed, strict=True)]


def batches_of(count: int, batch_size: int, generator: torch.Generator, parts: int = 1) -> list[Tensor]:
    """Shuffled indices in batches. A last batch of which a GPU of ``parts`` would get one image is left out: batch norm cannot
    train on it."""
    order = torch.randperm(count, generator=generator)
    return [batch for batch in order.split(batch_size) if all(len(part) > 1 for part in batch.chunk(parts))]
