"""Triggers of published backdoor attacks: pure functions, uint8 ``[N, C, H, W]`` in, the same out.

Results are clipped to 0..255 and become whole grey levels by truncation, as in BB's transforms; only :func:`sample_specific`,
which BB does not have, rounds. Memory grows with N: give large sets in parts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fmp_core.data.images import Size

CUTOFF = 4  # of the waves in the low-frequency pattern, along each axis


def _grey_levels(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def corner_patch(size: Size, side: int) -> Tensor:
    """The BadNets trigger: uint8 ``[C, H, W]``, a white square of ``side`` pixels in the lower right corner, else 0."""
    height, width, channels = size
    trigger = torch.zeros(channels, height, width, dtype=torch.uint8)
    trigger[:, -side:, -side:] = 255
    return trigger


def bb_patch(size: Size) -> Tensor:
    """BB's mask (``resource/badnet``): the square of 3 pixels at 32x32, enlarged or reduced with Pillow for other sizes.

    At 64x64 it covers 7x7 pixels, those towards the image in shades of grey, since BB resizes its mask bilinearly.
    """
    height, width, channels = size
    mask = Image.fromarray(corner_patch((32, 32, 1), 3)[0].numpy())
    resized = torch.from_numpy(np.array(mask.resize((width, height), Image.Resampling.BILINEAR)))
    return resized.expand(channels, height, width)


def badnet(images: Tensor, trigger: Tensor) -> Tensor:
    """BadNets (Gu et al. 2017; BB ``patch.py``, AddMaskPatchTrigger): ``trigger`` (uint8 ``[C, H, W]``) where it is not 0."""
    return torch.where(trigger > 0, trigger, images)


def plaid(size: Size, seed: int) -> Tensor:
    """A colourful picture of our own to blend in, uint8 ``[C, H, W]``: four random plane waves per channel over 0..255."""
    height, width, channels = size
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.rand(channels, 4, 3, generator=draw, dtype=torch.float64)
    turns = 2 * math.pi * (drawn * torch.tensor([6.0, 6.0, 1.0]) - torch.tensor([3.0, 3.0, 0.0]))
    rows = torch.arange(height, dtype=torch.float64)[:, None] / height
    columns = torch.arange(width, dtype=torch.float64) / width
    phase = turns[..., 0, None, None] * rows + turns[..., 1, None, None] * columns + turns[..., 2, None, None]
    waves = phase.sin().sum(1)
    low, high = waves.amin((1, 2), keepdim=True), waves.amax((1, 2), keepdim=True)
    return (255 * ((waves - low) / (high - low))).round().to(torch.uint8)


def blended(images: Tensor, picture: Tensor, alpha: float) -> Tensor:
    """Blended (Chen et al. 2017; BB ``blended.py``): ``(1 - alpha) * image + alpha * picture``, picture uint8 ``[C, H, W]``."""
    return _grey_levels((1 - alpha) * images.double() + alpha * picture.double())


def low_frequency_pattern(size: Size, seed: int, amplitude: float = 51.0) -> Tensor:
    """Our own low-frequency pattern, float64 ``[C, H, W]`` from 0 to ``amplitude`` grey levels, as strong as BB's.

    Random amounts of the DCT-II waves (u, v), 0 < u + v, u and v below ``CUTOFF``. What lies more than 0.9 standard deviations
    below the mean becomes 0, and the maximum ``amplitude``: so the mean change is 12 grey levels and a fifth of the values are
    0, as in the patterns that BB ships (``resource/lowFrequency``: 11 to 19 grey levels, 8 to 33 % zeros, maximum 51).
    """
    height, width, channels = size
    draw = torch.Generator().manual_seed(seed)
    amounts = torch.randn(channels, CUTOFF, CUTOFF, generator=draw, dtype=torch.float64)
    amounts[:, 0, 0] = 0
    positions = [(2 * torch.arange(length, dtype=torch.float64) + 1) / (2 * length) for length in (height, width)]
    cosines = [torch.cos(math.pi * torch.arange(CUTOFF, dtype=torch.float64)[:, None] * at) for at in positions]
    waves = torch.einsum("cuv,uh,vw->chw", amounts, *cosines)
    floor = waves.mean() - 0.9 * waves.std()
    return amplitude * ((waves - floor) / (waves.max() - floor)).clamp(min=0)


def low_frequency(images: Tensor, pattern: Tensor) -> Tensor:
    """LF (Zeng et al. 2021; BB ``patch.py``, SimpleAdditiveTrigger): ``pattern`` in grey levels, ``[C, H, W]``, is added."""
    return _grey_levels(images.double() + pattern.double())


def sig(images: Tensor, delta: float, frequency: float) -> Tensor:
    """SIG (Barni et al. 2019; BB ``sig.py``): adds ``delta * sin(2 pi column frequency / width)`` grey levels to each row."""
    width = images.shape[-1]
    columns = torch.arange(width, dtype=torch.float64)
    return _grey_levels(images.double() + delta * torch.sin(2 * math.pi * columns * frequency / width))


def warp_field(size: Size, seed: int, strength: float = 0.5, points: int = 4) -> Tensor:
    """WaNet's displacement (Nguyen & Tran 2021, section 3.2; BB ``attack/wanet.py``), float32 ``[H, W, 2]`` in (x, y), in units
    of half the image: ``points`` x ``points`` random vectors of mean size 1, bicubically enlarged, times ``strength / H``. With
    the defaults no pixel moves by more than 1.2 pixels along an axis.
    """
    height, width, _ = size
    draw = torch.Generator().manual_seed(seed)
    control = torch.rand(1, 2, points, points, generator=draw) * 2 - 1
    control = control / control.abs().mean()
    field = F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0]
    return (strength * field).permute(1, 2, 0) / torch.tensor([width, height])


def wanet(images: Tensor, field: Tensor, noise_seeds: Tensor | None = None, rescale: float = 1.0) -> Tensor:
    """Images warped by ``field`` (:func:`warp_field`): bilinear, positions outside the image moved onto its border. Pixels are
    floats in [0,1] meanwhile, so that truncation falls as in BB (``attack/wanet.py``, ToPILImage).

    With ``noise_seeds`` (int64 ``[N]``), each image gets ``field`` plus its own uniform noise of less than half a pixel (the
    paper's *noise mode*, BB's *cross* samples), so that a model learns the one warp and not warping as such.
    """
    height, width = images.shape[2:]
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    still = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    grids = ((still + field) * rescale).clamp(-1, 1).expand(len(images), height, width, 2)
    if noise_seeds is not None:
        noise = torch.empty(len(images), height, width, 2)
        for row, seed in enumerate(noise_seeds.tolist()):
            noise[row] = torch.rand(height, width, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        grids = (grids + noise / torch.tensor([width, height])).clamp(-1, 1)
    return _grey_levels(F.grid_sample(images.float() / 255, grids, align_corners=True) * 255)


def sample_specific(images: Tensor, strength: float, seed: int) -> Tensor:
    """An invisible perturbation that depends on the image, in the manner of SSBA (Li et al. 2021): not SSBA's own.

    SSBA trains a StegaStamp encoder that hides a string in the image so that a decoder finds it again. Here the encoder has
    the same inputs (the image, and a map drawn from ``seed`` in place of the string), two convolutions with random weights,
    and no training and no decoder. Its output is scaled to a root mean square of ``strength`` grey levels in each image.
    """
    channels, height, width = images.shape[1:]
    draw = torch.Generator().manual_seed(seed)
    code = torch.randn(1, 4, -(-height // 4), -(-width // 4), generator=draw)  # coarse, as the string's map in StegaStamp
    code = F.interpolate(code, size=(height, width)) / 2
    first = torch.randn(16, channels + 4, 3, 3, generator=draw) / (9 * (channels + 4)) ** 0.5
    second = torch.randn(channels, 16, 3, 3, generator=draw)
    seen = torch.cat([images.float() / 127.5 - 1, code.expand(len(images), -1, -1, -1)], 1)
    hidden = F.relu(F.conv2d(F.pad(seen, [1] * 4, mode="replicate"), first))
    out = F.conv2d(F.pad(hidden, [1] * 4, mode="replicate"), second)
    out = out - out.mean((2, 3), keepdim=True)
    out = out / out.square().mean((1, 2, 3), keepdim=True).sqrt()
    return _grey_levels((images.float() + strength * out).round())
