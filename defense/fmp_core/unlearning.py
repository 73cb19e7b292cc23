"""Images to unlearn a backdoor on: clean ones with a reversed trigger, and their true labels (not in the paper).

Fine-tuning on clean images alone revives a pruned backdoor (docs/strong.md). Images that carry what turns the attacked model to
the target, with their true labels, teach it that this means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compute import rows_per_batch
from .evaluate import to_unit
from .reversed_trigger import ReversedTrigger


def unlearning_images(images: Tensor, triggers: Sequence[ReversedTrigger], seed: int) -> Tensor:
    """Each image with one of the ``triggers`` (at least one), drawn by ``seed``; uint8 ``[M, C, H, W]`` in and out."""
    drawn = torch.randint(len(triggers), (len(images),), generator=torch.Generator().manual_seed(seed))
    made = torch.empty_like(images)
    for number, trigger in enumerate(triggers):
        for rows in (drawn == number).nonzero().flatten().to(images.device).split(rows_per_batch(images.device)):
            made[rows] = trigger.on(to_unit(images[rows])).mul(255).round().to(torch.uint8)
    return made
