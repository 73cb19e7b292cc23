"""Triggers that users bring: images, and BackdoorBench's ``.npy`` files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fmp_core.data.images import Size, read_images
from fmp_core.errors import UserError


def _load_array(path: Path) -> np.ndarray:
    # Encoded training sets are large and poisoned in part, so the file is mapped. Pickled objects are refused.
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several")
        return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npy array ({error}); give another file.") from None


def read_trigger(path: Path, size: Size) -> Tensor:
    """An image, or a ``.npy`` of ``[H, W]``, ``[H, W, C]`` or ``[1, H, W, C]``, as ``[C, H, W]`` in grey levels.

    Images become uint8 and are resized as BB does; arrays must have the dataset's size and become float64. An array of values
    up to 1, such as a mask of 0 and 1, is taken as shares of 255: a third of BB's LF patterns are stored so (0 to 0.2), and BB
    adds them as they are, which changes no pixel. Raises UserError if the file cannot be read, does not fit, or changes
    nothing.
    """
    if not path.is_file():
        raise UserError(f"--trigger_file {path} does not exist; check the path.")
    if path.suffix != ".npy":
        trigger = read_images([path], size)[0]
    else:
        array = np.array(_load_array(path))
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        array = np.stack([array] * size[2], -1) if array.ndim == 2 else array
        if array.shape != size or array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise UserError(f"--trigger_file {path} holds {array.dtype} {array.shape}, but needs numbers of shape {size}.")
        levels = array.astype(np.float64)
        levels *= 255 if np.abs(levels).max() <= 1 else 1
        trigger = torch.from_numpy(levels).permute(2, 0, 1)
    if not trigger.any():
        raise UserError(f"--trigger_file {path} is 0 everywhere, so it would change no image; give another one.")
    return trigger


def open_replacements(path: Path, total: int, size: Size) -> np.ndarray:
    """All images of a set after another program's attack (BB ``SSBA.py``): uint8 ``[total, H, W, C]``, read as needed."""
    array = _load_array(path)
    if array.shape != (total, *size) or array.dtype != np.uint8:
        raise UserError(f"{path} holds {array.dtype} {array.shape}, but the dataset needs uint8 {(total, *size)}.")
    return array
