"""Triggers against values worked out by hand, or by slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fmp_core.attacks import triggers
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

SIZE = (32, 32, 3)


def pictures(count: int = 6, size: tuple[int, int, int] = SIZE, low: int = 0, high: int = 256) -> Tensor:
    height, width, channels = size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, high, (count, channels, height, width), generator=generator).to(torch.uint8)


def smooth_pictures() -> Tensor:
    """Like photographs, neighbouring pixels are alike: six waves of different direction."""
    rows, columns = torch.arange(32)[:, None] / 32, torch.arange(32) / 32
    waves = [
        127 + 90 * torch.sin(2 * math.pi * (a * rows + b * columns))
        for a, b in ((1, 0), (0, 1), (1, 1), (2, 1), (1, -2), (2, 2))
    ]
    return torch.stack(waves)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)


ALL = {
    "badnet": lambda x: triggers.badnet(x, triggers.corner_patch(SIZE, 3)),
    "blended": lambda x: triggers.blended(x, triggers.plaid(SIZE, 0), 0.2),
    "lf": lambda x: triggers.low_frequency(x, triggers.low_frequency_pattern(SIZE, 0)),
    "sig": lambda x: triggers.sig(x, 40, 6),
    "wanet": lambda x: triggers.wanet(x, triggers.warp_field(SIZE, 0)),
    "noise": lambda x: triggers.wanet(x, triggers.warp_field(SIZE, 0), torch.arange(len(x))),
    "ssba": lambda x: triggers.sample_specific(x, 8, 0),
}


@pytest.mark.parametrize("trigger", ALL.values(), ids=ALL.keys())
def test_a_trigger_is_a_pure_function_of_each_image(trigger):
    images = pictures()
    before = images.clone()
    result = trigger(images)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    assert torch.equal(images, before) and torch.equal(trigger(images), result)
    assert torch.equal(trigger(images[:1]), result[:1])  # what lies beside an image does not matter
    assert all(not torch.equal(image, made) for image, made in zip(images, result, strict=True))
    assert trigger(images[:0]).shape == (0, 3, 32, 32)


def test_badnet_is_a_white_corner_and_nothing_else():
    images = pictures(high=255)
    made = triggers.badnet(images, triggers.corner_patch(SIZE, 3))
    assert (made[:, :, 29:, 29:] == 255).all()
    changed = (made != images).any(1).any(0)
    assert changed.sum() == 9 and changed[29:, 29:].all()


def test_the_default_patch_is_backdoorbenchs_mask_resized():
    assert torch.equal(triggers.bb_patch(SIZE), triggers.corner_patch(SIZE, 3))
    mask = triggers.bb_patch((64, 64, 3))
    # What Pillow makes of BB's trigger_image.png for Tiny ImageNet: the products of 255 and two edges, rounded.
    assert (mask[:, 59:, 59:] == 255).all() and int((mask[0] > 0).sum()) == 49
    assert mask[0, -1].unique().tolist() == [0, 64, 191, 255] and mask[0, 57, 57] == 16
    assert torch.equal(mask, mask.transpose(1, 2))


def test_a_mask_keeps_its_colours_and_its_zeros_are_transparent():
    mask = torch.zeros(3, 32, 32, dtype=torch.uint8)
    mask[0, 5, 6], mask[2, 5, 6] = 200, 1
    images = pictures()
    made = triggers.badnet(images, mask)
    assert (made[:, 0, 5, 6] == 200).all() and (made[:, 2, 5, 6] == 1).all()
    assert torch.equal(made[:, 1], images[:, 1])  # black cannot be stamped, as with BB's masks


def test_blended_mixes_and_truncates():
    image = torch.tensor([0, 100, 255, 7], dtype=torch.uint8).view(1, 1, 2, 2)
    picture = torch.tensor([255, 50, 255, 9], dtype=torch.uint8).view(1, 2, 2)
    made = triggers.blended(image, picture, 0.2).flatten().tolist()
    assert made == [51, 90, 255, 7]  # 0.8*7 + 0.2*9 = 7.4
    assert torch.equal(triggers.blended(image, picture, 0.0), image)
    assert torch.equal(triggers.blended(image, picture, 1.0)[0], picture)


def test_our_picture_is_colourful_and_repeatable():
    picture = triggers.plaid(SIZE, 0)
    assert torch.equal(picture, triggers.plaid(SIZE, 0)) and not torch.equal(picture, triggers.plaid(SIZE, 1))
    for channel in picture:
        assert channel.min() == 0 and channel.max() == 255 and 40 < channel.float().std() < 100
    assert not torch.equal(picture[0], picture[1])


def dct(values: Tensor) -> Tensor:
    """The orthonormal DCT-II of ``[C, H, W]``, from its definition."""

    def matrix(length: int) -> Tensor:
        k, n = torch.arange(length, dtype=torch.float64)[:, None], torch.arange(length, dtype=torch.float64)
        basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * length)) * math.sqrt(2 / length)
        basis[0] /= math.sqrt(2)
        return basis

    return matrix(values.shape[1]) @ values.double() @ matrix(values.shape[2]).T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [SIZE, (64, 64, 3), (24, 40, 1)])
def test_the_lf_pattern_is_as_low_and_as_strong_as_backdoorbenchs(size: tuple[int, int, int], seed: int):
    pattern = triggers.low_frequency_pattern(size, seed)
    assert pattern.shape == (size[2], *size[:2])
    assert pattern.min() == 0 and pattern.max() == pytest.approx(51)
    # As BB's patterns for preactresnet18: mean 12 to 16, 8 to 33 % zeros, 95 % of the varying power in the waves below 4.
    assert 10 < pattern.mean() < (15 if size[2] == 3 else 19.5)
    assert 0.08 < (pattern == 0).double().mean() < 0.33
    power = dct(pattern).square()
    power[:, 0, 0] = 0
    assert power[:, :4, :4].sum() > 0.93 * power.sum() and power[:, :8, :8].sum() > 0.99 * power.sum()


def test_lf_adds_and_clips():
    pattern = torch.tensor([10.0, 10.9, -300.0, 5.0], dtype=torch.float64).view(1, 2, 2)
    image = torch.tensor([0, 1, 200, 253], dtype=torch.uint8).view(1, 1, 2, 2)
    assert triggers.low_frequency(image, pattern).flatten().tolist() == [10, 11, 0, 255]


def test_sig_is_the_papers_sinusoid_along_the_columns():
    images = pictures()
    made = triggers.sig(images, 40, 6).numpy()
    for column in (0, 1, 5, 31):
        wave = 40 * math.sin(2 * math.pi * column * 6 / 32)
        expected = np.floor(np.clip(images[..., column].numpy() + wave, 0, 255))
        np.testing.assert_array_equal(made[..., column], expected)


def test_the_warp_moves_no_pixel_far_and_depends_on_its_seed():
    for seed in range(30):
        field = triggers.warp_field(SIZE, seed)
        pixels = field * torch.tensor([31, 31]) / 2
        assert 0.05 < pixels.abs().mean() < 0.35 and pixels.abs().max() < 1.2
    assert torch.equal(triggers.warp_field(SIZE, 1), triggers.warp_field(SIZE, 1))
    assert not torch.equal(triggers.warp_field(SIZE, 1), triggers.warp_field(SIZE, 2))


def test_wanet_moves_pixels_by_the_field():
    images = pictures(2, (5, 9, 3))
    right_by_one = torch.zeros(5, 9, 2)
    right_by_one[..., 0] = 2 / 8  # x first; two units span the 8 steps between the outer columns
    made = triggers.wanet(images, right_by_one).int()
    assert (made[..., :-1] - images[..., 1:].int()).abs().max() <= 1  # truncated, as is what follows
    assert (made[..., -1] - images[..., -1].int()).abs().max() <= 1  # beyond the image lies its border
    half_down = torch.zeros(5, 9, 2)
    half_down[..., 1] = 1 / 4
    middle = (images[:, :, :-1].float() + images[:, :, 1:].float()) / 2
    assert (triggers.wanet(images, half_down)[:, :, :-1].float() - middle).abs().max() < 1


def test_a_warp_truncates_as_backdoorbench_does():
    """BB warps images in [0,1] and saves them by torchvision's ToPILImage (``attack/wanet.py``, ``bd_dataset_v2.py``)."""
    images, field = pictures(20), triggers.warp_field(SIZE, 0)
    steps = torch.linspace(-1, 1, 32)
    still = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    grid = (still + field).clamp(-1, 1).expand(20, 32, 32, 2)
    warped = torch.nn.functional.grid_sample(images.float() / 255, grid, align_corners=True)
    saved = torch.stack([torch.from_numpy(np.array(to_pil_image(image))).permute(2, 0, 1) for image in warped])
    assert torch.equal(triggers.wanet(images, field), saved)


def test_the_noise_mode_is_another_small_warp_for_each_seed():
    images, still = smooth_pictures()[:1].expand(3, -1, -1, -1), torch.zeros(32, 32, 2)
    made = triggers.wanet(images, still, torch.tensor([4, 5, 4]))
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    steps = (images[0].float().diff(dim=1).abs().max(), images[0].float().diff(dim=2).abs().max())
    assert 0 < (made.int() - images.int()).abs().max() <= 0.5 * sum(steps) + 1  # less than half a pixel along each axis


def test_ssba_like_perturbations_are_small_and_differ_between_images():
    images = smooth_pictures()
    moved = triggers.sample_specific(images, 8, 0).double() - images.double()
    sizes = moved.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 8.0), rtol=0.03, atol=0)
    rows = torch.nn.functional.normalize(moved.flatten(1))
    alike = (rows @ rows.T)[~torch.eye(6, dtype=torch.bool)]
    assert alike.min() > 0.05 and alike.max() < 0.9  # sample-specific, but with something common that can be learnt
    other = triggers.sample_specific(images, 8, 1)
    assert not torch.equal(other, triggers.sample_specific(images, 8, 0))


@pytest.mark.parametrize("rescale", [1.0, 0.5])
def test_the_warp_and_its_noise_are_backdoorbenchs(rescale: float):
    """As ``attack/wanet.py`` writes them, on square images; the noise is drawn once for each image."""
    drawn = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    drawn = drawn / torch.mean(torch.abs(drawn))
    enlarged = torch.nn.functional.interpolate(drawn, size=32, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    steps = torch.linspace(-1, 1, 32)
    still = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)[None]
    grid = torch.clamp((still + 0.5 * enlarged / 32) * rescale, -1, 1)
    noise = torch.rand(1, 32, 32, 2, generator=torch.Generator().manual_seed(9)) * 2 - 1
    images, field = pictures(1), triggers.warp_field(SIZE, 3)
    torch.testing.assert_close(field, 0.5 * enlarged[0] / 32)
    for seeds, where in ((None, grid), (torch.tensor([9]), torch.clamp(grid + noise / 32, -1, 1))):
        expected = 255 * torch.nn.functional.grid_sample(images.float() / 255, where, align_corners=True)
        made = triggers.wanet(images, field, seeds, rescale)
        assert (made.float() - expected.floor()).abs().max() <= 1  # where rounding decides what is truncated
        assert (made == expected.byte()).double().mean() > 0.99
