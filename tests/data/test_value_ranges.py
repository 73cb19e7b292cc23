"""Images held as numbers whose range or layout fits two readings, of which one is right."""

from __future__ import annotations

import pytest
import torch
from fmp_core.data.datasets import FACTS
from fmp_core.data.pixel_range import pixels_of
from torch import Tensor

SIZE = (4, 4, 3)
SCALES = [(FACTS["cifar10"].mean, FACTS["cifar10"].std)]
DRAWN = torch.Generator().manual_seed(0)


def between(low: int, high: int) -> Tensor:
    return torch.randint(low, high, (5, 3, 4, 4), generator=DRAWN).to(torch.uint8)


def test_bright_normalised_images_are_no_fractions() -> None:
    """They lie between 0 and 1 as fractions do, but are grey levels only when the normalisation is undone."""
    pixels = between(130, 170)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in SCALES[0])
    stored = (pixels / 255 - mean) / std
    assert float(stored.min()) >= 0 and float(stored.max()) <= 1
    assert torch.equal(pixels_of(stored, SIZE, SCALES), pixels)


def test_levels_between_whole_ones_are_rounded() -> None:
    """As resizing in floats leaves them; dark ones might be anything, and are refused."""
    pixels = between(20, 240)
    assert torch.equal(pixels_of(pixels + 0.3, SIZE, SCALES), pixels)
    with pytest.raises(ValueError, match="neither pixels"):
        pixels_of(between(0, 3) + 1.3, SIZE, SCALES)


def test_whole_numbers_are_grey_levels_however_dark_they_are() -> None:
    dark = between(0, 2)
    assert torch.equal(pixels_of(dark, SIZE, SCALES), dark)
    assert torch.equal(pixels_of(dark.long(), SIZE, SCALES), dark)


@pytest.mark.parametrize("stacked", [True, False])
def test_grey_images_may_come_without_their_channel(stacked: bool) -> None:
    grey = between(0, 256)[:, 0]
    images = grey.numpy() if stacked else list(grey.numpy())
    assert torch.equal(pixels_of(images, (4, 4, 1), []), grey[:, None])
