"""Warps: all pixels displaced by one smooth field, as the trigger of WaNet (Nguyen & Tran 2021, section 3.2) does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL_POINTS = 4  # along an axis, as in WaNet; what lies between them is bicubic


def smooth_field(control: Tensor, height: int, width: int) -> Tensor:
    """Displacements ``[1, 2, K, K]`` at the control points -> ``[1, 2, H, W]``, bicubic, corners on corners.

    Two matrix products: the gradient of torch's own bicubic interpolation differs from call to call on a GPU.
    """
    points = torch.eye(control.shape[-1], device=control.device)[None, None]

    def weights(pixels: int) -> Tensor:
        return F.interpolate(points, size=(pixels, control.shape[-1]), mode="bicubic", align_corners=True)[0, 0]

    return weights(height) @ control @ weights(width).T


def warped(images: Tensor, field: Tensor) -> Tensor:
    """``images`` ``[B, C, H, W]``, each pixel replaced by what lies ``field`` ``[1, 2, H, W]`` (to the right, down; in pixels)
    from it: bilinear, positions outside the image moved onto its border."""
    height, width = images.shape[2:]
    rows, columns = (torch.linspace(-1, 1, size, device=images.device) for size in (height, width))
    still = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    moved = torch.stack([field[0, 0] * (2 / max(1, width - 1)), field[0, 1] * (2 / max(1, height - 1))], -1)
    grid = (still + moved).expand(len(images), height, width, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)
