"""FRG images to fine-tune on: what pruned feature maps respond to, with the true label (not in the paper).

Fine-tuning on clean images alone revives a pruned backdoor (docs/strong.md). Images that carry what the pruned maps of the
attacked model respond to, and their true labels, teach the model that it means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .compute import rows_per_batch
from .evaluate import to_unit
from .feature_maps import ConvLayer, frozen
from .frg import Attack, upward_images
from .ranking import slices


def unlearning_images(
    model: nn.Module, layers: Sequence[ConvLayer], chosen: Tensor, images: Tensor, attack: Attack, seed: int
) -> Tensor:
    """For each image, the one that a chosen feature map, drawn at random, makes of it.

    Args:
        model: the attacked one, not yet pruned; takes pixels in [0,1]; left as it was found.
        chosen: bool ``[N]``, at least one map.
        images: uint8 ``[M, C, H, W]`` on the model's device.
        attack: of family ``sparse`` or ``dense``.

    Returns:
        uint8 ``[M, C, H, W]``.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = chosen.nonzero().flatten()
    drawn = maps[torch.randint(len(maps), (len(images),), generator=generator)]
    made = images.clone()
    with frozen(model):
        for layer, where in slices(layers):
            rows = ((drawn >= where.start) & (drawn < where.stop)).nonzero().flatten()
            for part in rows.split(rows_per_batch(images.device)) if len(rows) else ():
                channels = (drawn[part] - where.start).to(images.device)
                pixels = upward_images(model, layer, channels, to_unit(images[part.to(images.device)]), attack)
                made[part.to(images.device)] = pixels.mul(255).round().to(torch.uint8)
    return made
