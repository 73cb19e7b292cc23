"""Image files -> uint8 tensors, decoded as BackdoorBench's transforms see them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmp_core.data.names import IMAGE_FORMATS
from fmp_core.errors import UserError

Size = tuple[int, int, int]  # height, width, channels
MOST_PIXELS = 50_000_000  # of one file; a small PNG can claim 16 times that, which takes seconds and gigabytes
MAX_MEAN_ENLARGEMENT = 16  # times the pixels of the record's image size, that stored images may have on average


@dataclass(frozen=True)
class Split:
    """A training or test set: ``labels`` int64 ``[N]``; ``read(indices)`` gives uint8 ``[n, C, H, W]``."""

    labels: Tensor
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


def file_split(paths: Sequence[Path], labels: Sequence[int], size: Size) -> Split:
    """Image files and their labels; files are decoded only when they are read."""
    return Split(torch.tensor(labels, dtype=torch.int64), lambda indices: read_images([paths[int(i)] for i in indices], size))


def room_for(count: int, size: Size) -> Tensor:
    """An uninitialised uint8 tensor ``[count, C, H, W]``; UserError if it would not fit into this machine's memory."""
    height, width, channels = size
    needed = count * math.prod(size)
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(f"{count} images of {height}x{width} take {needed / 2**30:.0f} GiB, more than this machine's memory.")
    return torch.empty(count, channels, height, width, dtype=torch.uint8)


def most_pixels(count: int, size: Size) -> int:
    """How many pixels ``count`` poisoned images of a record, which are shown at ``size``, may have: small ones take seconds."""
    return MOST_PIXELS + MAX_MEAN_ENLARGEMENT * count * size[0] * size[1]


def to_pixels(image: Image.Image, size: Size) -> Tensor:
    """A PIL image as uint8 ``[C, H, W]``, resized the way BB's ``Resize((H, W))`` does (bilinear).

    Raises ValueError: its pixels have more than 8 bits, which Pillow would cut off at 255.
    """
    height, width, channels = size
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}), convert them to 8")
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image, dtype=np.uint8).reshape(height, width, channels)).permute(2, 0, 1)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 ``[C, H, W]`` as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def resized(images: Tensor, size: Size) -> Tensor:
    """uint8 ``[N, C, H, W]`` of any height and width, as :func:`to_pixels`."""
    if not len(images) or images.shape[1:] == (size[2], *size[:2]):
        return images
    pixels = room_for(len(images), size)
    for row, image in enumerate(images):
        pixels[row] = to_pixels(to_pil(image), size)
    return pixels


def read_images(paths: Sequence[Path], size: Size, most_pixels: float = math.inf) -> Tensor:
    """Decode files to one uint8 tensor ``[N, C, H, W]``.

    Raises UserError, naming the file, if one is missing, is not an image, or is truncated, or if all of them together have more
    than ``most_pixels``.
    """
    pixels, decoded = room_for(len(paths), size), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; what matters is an error
        for row, path in enumerate(paths):
            try:
                with Image.open(path, formats=IMAGE_FORMATS) as image:
                    decoded += math.prod(image.size)
                    if math.prod(image.size) > MOST_PIXELS or decoded > most_pixels:
                        raise ValueError(f"it has {image.width}x{image.height} pixels")
                    pixels[row] = to_pixels(image, size)
            except FileNotFoundError:
                raise UserError(f"Image {path} is missing; restore the folder it belongs to.") from None
            except Exception as error:  # Pillow's decoders raise a dozen unrelated types for damaged bytes
                raise UserError(f"Image {path} cannot be decoded ({error}); restore it from its source.") from None
    return pixels
