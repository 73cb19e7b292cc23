"""Image files -> uint8 tensors, decoded as BackdoorBench's transforms see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError

Size = tuple[int, int, int]  # height, width, channels


def to_pixels(image: Image.Image, size: Size) -> Tensor:
    """A PIL image as uint8 ``[C, H, W]``, resized the way BB's ``Resize((H, W))`` does (bilinear)."""
    height, width, channels = size
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image, dtype=np.uint8).reshape(height, width, channels)).permute(2, 0, 1)


def read_images(paths: Sequence[Path], size: Size) -> Tensor:
    """Decode files to one uint8 tensor ``[N, C, H, W]``.

    Raises:
        UserError: a file is missing, is not an image, or is truncated; names the file.
    """
    height, width, channels = size
    pixels = torch.empty(len(paths), channels, height, width, dtype=torch.uint8)
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels[row] = to_pixels(image, size)
        except FileNotFoundError:
            raise UserError(f"Image {path} is missing; restore the folder it belongs to.") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"Image {path} cannot be decoded ({error}); restore it from its source.") from None
    return pixels
