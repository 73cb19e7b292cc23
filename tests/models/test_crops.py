"""BB's training transform: zero-pad, crop and flip."""

from __future__ import annotations

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.models.training import Crops
from torch import Tensor

MOVING = DatasetFacts(5, (8, 8, 3), flip=True, crop_padding=2)


def numbered(count: int, height: int = 5, width: int = 6) -> Tensor:
    """Images whose pixels are all different and not 0, so a pad pixel is told from a moved one."""
    return (1 + torch.arange(count * 2 * height * width) % 251).view(count, 2, height, width).to(torch.uint8)


def crop_of(image: Tensor, padding: int, top: int, left: int, flip: bool) -> Tensor:
    """Zero-pad, crop at (top, left), then flip: slow, pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row, column = y + top - padding, x + left - padding
            if 0 <= row < height and 0 <= column < width:
                out[:, y, width - 1 - x if flip else x] = image[:, row, column]
    return out


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (1, True), (0, True), (0, False)])
def test_crops_are_zero_pad_crop_and_flip_of_each_image(padding: int, flip: bool) -> None:
    facts = DatasetFacts(None, (5, 6, 2), flip=flip, crop_padding=padding)
    images = numbered(60)
    crops = Crops.draw(len(images), torch.Generator().manual_seed(0), facts)
    result = crops(images)
    assert torch.equal(crops(images), result)  # drawn once, applied as often as one likes
    assert result.dtype == torch.uint8 and result.shape == images.shape
    drawn = set()
    for image, made in zip(images, result, strict=True):
        ways = [
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in ([False, True] if flip else [False])
            if torch.equal(crop_of(image, padding, top, left, mirrored), made)
        ]
        assert len(ways) == 1, "not a crop of this image"
        drawn.add(ways[0])
    places = 2 * padding + 1
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(places))  # every shift occurs
    assert {mirrored for _, _, mirrored in drawn} == ({False, True} if flip else {False})
    if padding:
        assert any(top != left for top, left, _ in drawn)  # the two shifts are independent


def test_crops_depend_on_their_generator_alone() -> None:
    images = numbered(20)
    first, second, other = (Crops.draw(20, torch.Generator().manual_seed(seed), MOVING)(images) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
