"""Margins of FRG images to first order.

Within eps = 1/255 of an image a network is nearly linear, so the margin at one FRG image follows from the gradient of the
margin at another image close by, without a forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmp_core.models.feature_maps import frozen
from fmp_core.system.devices import by_batch

RIVALS = 3  # classes that could overtake the true one: those with the largest logits
ROWS = 64  # images per forward and backward pass


class MarginTaylor:
    """First-order Taylor expansion of margins, ``min_r(m_r(x) + <x' - x, grad m_r(x)>)`` at FRG images x'.

    m_r is the true class's logit less rival r's.

    Args:
        model: takes pixels in [0,1]; left as it was found.
        images: the x, float ``[M, C, H, W]`` in [0,1], close to the FRG images; ``labels`` int64 ``[M]``.
        rows: images per forward and backward pass, at most :data:`ROWS`; fewer if memory runs out.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, rows: int = ROWS):
        self.images = images

        def expand(some: slice) -> tuple[Tensor, Tensor]:
            return _expansion(model, images[some], labels[some])

        with frozen(model), torch.enable_grad():
            parts = by_batch(len(images), min(rows, ROWS), images.device, expand)
        self.values, self.slopes = (torch.cat(column) for column in zip(*parts, strict=True))  # [M, R], [M, R, C, H, W]

    def margins(self, reverse: Tensor, image_ids: Tensor) -> Tensor:
        """Predicted margins ``[n, B]`` of ``reverse`` ``[n, B, C, H, W]``, made from the images at ``image_ids`` ``[B]``."""
        change = reverse - self.images[image_ids]
        # Summed in float64: then the bits do not depend on how many maps are predicted at once.
        moved = (change[:, :, None] * self.slopes[image_ids]).flatten(3).sum(3, dtype=torch.float64)
        return (self.values[image_ids] + moved).amin(2).float()


def _expansion(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The margins ``[B, R]`` over each rival, and their gradients ``[B, R, C, H, W]``."""
    pixels = images.detach().clone().requires_grad_()
    logits = model(pixels)
    others = logits.detach().scatter(1, labels[:, None], -torch.inf)
    rivals = others.topk(min(RIVALS, others.shape[1] - 1)).indices
    margins = logits.gather(1, labels[:, None]) - logits.gather(1, rivals)
    slopes = [torch.autograd.grad(column.sum(), pixels, retain_graph=True)[0] for column in margins.unbind(1)]
    return margins.detach(), torch.stack(slopes, 1)
