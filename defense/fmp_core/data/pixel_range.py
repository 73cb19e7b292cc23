"""Images that a record holds as numbers: which range and layout they have is found out, and they become uint8 pixels.

BackdoorBench v1 and its forks store images as PIL images, as arrays ``[H, W, C]`` of bytes, as float tensors ``[C, H, W]`` in
[0,1], in 0..255, or normalised. What cannot be told for certain is refused: a clipped image would give wrong metrics silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmp_core.data.images import Size, most_pixels, resized, room_for, to_pixels
from fmp_core.storage.placeholders import PickledImage

MANY_NUMBERS = 2**26  # images of fewer numbers take no time, however often one is named
MAX_ENLARGEMENT = 256  # times as many numbers as the largest stored image has, at which images may be shown
ROWS = 1024  # of a stacked tensor that are looked at together
Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and std per channel, of pixels in [0,1]
NEAR = 0.05  # grey levels: float32 is that exact after normalisation; float16 is not, and its images are refused
BEYOND = 1e-3  # that rounding may leave [0,1]
BYTES_FROM = 16  # a float image in 0..255 that is at least somewhere this bright; normalised pixels are below


def pixels_of(images: Any, size: Size, normalisations: Sequence[Normalisation]) -> Tensor:
    """Images held in a record as uint8 ``[N, C, H, W]``.

    Args:
        images: a tensor or array ``[N, C, H, W]`` or ``[N, H, W, C]``, or a list of PIL images (as the unpickler gives them),
            tensors or arrays ``[C, H, W]``, ``[H, W, C]`` or, of one channel, ``[H, W]``.
        normalisations: what normalised images are recognised by.

    Raises:
        ValueError: the shape is not ``size``, or the range of the numbers is uncertain.
    """
    stacked = isinstance(images, (Tensor, np.ndarray))
    if stacked and not (images := torch.as_tensor(images)).numel():
        raise ValueError("bd_test x holds no numbers")
    parts = list(images.split(ROWS)) if stacked else list(images)
    if not stacked and sum(map(_size_of, parts)) > 3 * most_pixels(len(parts), size):  # one image may be there many times
        raise ValueError(f"bd_test x holds {len(parts)} images that are far larger than {size[0]}x{size[1]}")
    largest = 0 if stacked else max(map(_size_of, parts), default=0)
    if largest and math.prod(size) > MAX_ENLARGEMENT * largest:
        raise ValueError(f"bd_test x holds images that are far smaller than {size[0]}x{size[1]}")
    many = len(parts) * math.prod(size) > MANY_NUMBERS
    if not stacked and many and len(set(map(id, parts))) < len(parts) / 2:
        raise ValueError("bd_test x holds the same image again and again")
    numbers = (_channels_first(part, size, stacked) for part in parts if not isinstance(part, PickledImage))
    to_levels = _to_levels(numbers, normalisations)
    pixels, row = room_for(len(images), size), 0
    for part in parts:
        if isinstance(part, PickledImage):
            batch = to_pixels(part.decode(), size)[None]
        else:
            levels = to_levels(_channels_first(part, size, stacked)).round().clamp(0, 255)
            batch = resized(levels.to(torch.uint8), size)
        pixels[row : row + len(batch)] = batch
        row += len(batch)
    return pixels


def _size_of(part: Any) -> int:
    """How many numbers an image has."""
    return part.bytes_held if isinstance(part, PickledImage) else getattr(part, "nbytes", 0) // getattr(part, "itemsize", 1)


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


def _denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    middle, spread = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
    return (images.float() * spread + middle) * 255


def _to_levels(batches: Iterable[Tensor], normalisations: Sequence[Normalisation]) -> Callable[[Tensor], Tensor]:
    """The function that takes each batch ``[n, C, h, w]`` to grey levels 0..255, found from all of their numbers."""
    scales: dict[Any, Callable[[Tensor], Tensor]] = {"unit": lambda x: x.float() * 255, "bytes": lambda x: x.float()}
    scales |= {(*mean, *std): partial(_denormalise, mean=mean, std=std) for mean, std in normalisations}
    low, high, kinds, whole = float("inf"), float("-inf"), set(), dict.fromkeys(scales, True)
    for batch in batches:
        if batch.is_complex() or not batch.numel():
            raise ValueError("bd_test x holds an image without numbers")
        if not batch.isfinite().all():
            raise ValueError("bd_test x holds NaN or infinite numbers")
        kinds.add("numbers" if batch.is_floating_point() else "whole numbers")
        low, high = min(low, float(batch.min())), max(high, float(batch.max()))
        for name, scale in scales.items():
            whole[name] = whole[name] and _are_levels(scale(batch))
    if len(kinds) > 1:
        raise ValueError("bd_test x holds whole numbers and floats side by side")
    if not kinds or (kinds == {"whole numbers"} and low >= 0 and high <= 255):
        return scales["bytes"]
    normalised = [scales[name] for name in whole if whole[name] and name not in ("unit", "bytes")]
    if low >= -BEYOND and high <= 1 + BEYOND and (whole["unit"] or not normalised):
        return scales["unit"]
    if normalised:
        return normalised[0]
    if low >= 0 and 1 < high <= 255 and (whole["bytes"] or high >= BYTES_FROM):
        return scales["bytes"]
    raise ValueError(
        f"bd_test x holds {kinds.pop()} from {low:.4g} to {high:.4g}, which are neither pixels (0..255 or 0..1) nor "
        "pixels normalised with the dataset's mean and std; --mean and --std name others"
    )


def _are_levels(values: Tensor) -> bool:
    nearest = values.round()
    near = (values - nearest).abs().max() <= NEAR
    return bool(near) and float(nearest.min()) >= 0 and float(nearest.max()) <= 255
