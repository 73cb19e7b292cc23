"""Images that a record holds as numbers: which range and layout they have is found out, and they become uint8 pixels.

BackdoorBench v1 and its forks store images as PIL images, as arrays ``[H, W, C]`` of bytes, as float tensors ``[C, H, W]`` in
[0,1], in 0..255, or normalised. What cannot be told for certain is refused: a clipped image would give wrong metrics silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmp_core.data.images import Size, room_for, to_pixels
from fmp_core.storage.placeholders import PickledImage

ROWS = 1024  # of a stacked tensor that are looked at together
NEAR = 0.05  # grey levels: float32 is that exact after normalisation; float16 is not, and its images are refused
BEYOND = 1e-3  # that rounding may leave [0,1]
BYTES_FROM = 16  # a float image in 0..255 that is at least somewhere this bright; normalised pixels are below


def pixels_of(images: Any, size: Size, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images held in a record as uint8 ``[N, C, H, W]``.

    Args:
        images: a tensor or array ``[N, C, H, W]`` or ``[N, H, W, C]``, or a list of PIL images (as the unpickler gives them),
            tensors or arrays ``[C, H, W]``, ``[H, W, C]`` or, of one channel, ``[H, W]``.
        mean, std: per channel, of the dataset's normalisation: what normalised images are recognised by.

    Raises:
        ValueError: the shape is not ``size``, or the range of the numbers is uncertain.
    """
    stacked = isinstance(images, (Tensor, np.ndarray))
    parts = list(torch.as_tensor(images).split(ROWS)) if stacked else list(images)
    count = len(images)
    numbers = [part for part in parts if not isinstance(part, PickledImage)]
    unscale = _scale(lambda: (_channels_first(part, size, stacked) for part in numbers), mean, std)
    pixels, row = room_for(count, size), 0
    for part in parts:
        if isinstance(part, PickledImage):
            pixels[row] = to_pixels(part.decode(), size)
            row += 1
        else:
            batch = _channels_first(part, size, stacked)
            pixels[row : row + len(batch)] = _resized(unscale(batch).round().clamp(0, 255).to(torch.uint8), size)
            row += len(batch)
    return pixels


def _channels_first(part: Any, size: Size, stacked: bool) -> Tensor:
    """``part`` as ``[n, C, h, w]``; a tensor's layout is channels first, an array's channels last, where both would fit."""
    if not isinstance(part, (Tensor, np.ndarray)):
        raise ValueError(f"an image of bd_test is a {type(part).__name__}")
    height, width, channels = size
    batch = torch.as_tensor(part) if stacked else torch.as_tensor(part)[None]
    if channels == 1 and batch.ndim == 3:
        batch = batch[:, None]
    layouts = {"first": (channels, height, width), "last": (height, width, channels)}
    fitting = [name for name, shape in layouts.items() if tuple(batch.shape[1:]) == shape]
    if not fitting and not stacked and batch.ndim == 4:  # single images may have any size
        fitting = [name for name, place in (("first", 1), ("last", 3)) if batch.shape[place] == channels]
    if not fitting:
        raise ValueError(f"bd_test x has shape {tuple(batch.shape)}, which are no images of {height}x{width}x{channels}")
    preferred = "first" if isinstance(part, Tensor) else "last"
    layout = preferred if preferred in fitting else fitting[0]
    return batch if layout == "first" else batch.permute(0, 3, 1, 2)


def _resized(batch: Tensor, size: Size) -> Tensor:
    if batch.shape[1:] == (size[2], *size[:2]):
        return batch
    return torch.stack([to_pixels(Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()), size) for image in batch])


class _Range:
    """What all numbers of the images have in common."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.is_integer = False
        self.on_grid = {"unit": True, "bytes": True, "normalised": True}


def _scale(batches: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """The function that takes a batch ``[n, C, h, w]`` to grey levels 0..255."""
    middle, spread = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    scales = {
        "unit": lambda x: x.float() * 255,
        "bytes": lambda x: x.float(),
        "normalised": lambda x: (x.float() * spread + middle) * 255,
    }
    found = _look(batches(), scales)
    if found.low > found.high or (found.is_integer and found.low >= 0 and found.high <= 255):
        return scales["bytes"]  # no numbers at all, or bytes
    if found.low >= -BEYOND and found.high <= 1 + BEYOND and (found.on_grid["unit"] or not found.on_grid["normalised"]):
        return scales["unit"]
    if found.on_grid["normalised"]:
        return scales["normalised"]
    if found.low >= 0 and 1 < found.high <= 255 and (found.on_grid["bytes"] or found.high >= BYTES_FROM):
        return scales["bytes"]
    kind = "whole numbers" if found.is_integer else "numbers"
    raise ValueError(
        f"bd_test x holds {kind} from {found.low:.4g} to {found.high:.4g}, which are neither pixels (0..255 or 0..1) nor "
        "pixels normalised with the dataset's mean and std"
    )


def _look(batches: Iterator[Tensor], scales: dict[str, Any]) -> _Range:
    found = _Range()
    kinds = set()
    for batch in batches:
        if batch.is_complex() or not batch.numel():
            raise ValueError("bd_test x holds an image without numbers")
        kinds.add(batch.is_floating_point())
        if not batch.isfinite().all():
            raise ValueError("bd_test x holds NaN or infinite numbers")
        found.low, found.high = min(found.low, float(batch.min())), max(found.high, float(batch.max()))
        for name, scale in scales.items():
            if found.on_grid[name]:
                levels = scale(batch)
                whole = levels.round()
                near = (levels - whole).abs().max() <= NEAR
                found.on_grid[name] = bool(near) and float(whole.min()) >= 0 and float(whole.max()) <= 255
    if len(kinds) > 1:
        raise ValueError("bd_test x holds whole numbers and floats side by side")
    found.is_integer = kinds == {False}
    return found
