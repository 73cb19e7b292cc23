"""Convolutions over one pixel: the same numbers as torch's, by another way."""

import pytest
import torch
import torch.nn.functional as F
from fmp_core.models.one_pixel import OnePixelConvolutions
from torch import Tensor, nn


def test_a_call_with_few_arguments_is_left_alone() -> None:
    with OnePixelConvolutions():
        assert F.conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)).item() == 1


@pytest.mark.parametrize("size", [(2, 1), (1, 3)])
def test_gradients_over_one_row_of_pixels_are_those_of_float32(size: tuple[int, int]) -> None:
    """In bfloat16 oneDNN leaves some of them uninitialised."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(64, 64, 3, 2, 1, bias=False), torch.randn(32, 64, *size)

    def gradient() -> Tensor:
        return torch.autograd.grad(layer(images).float().square().sum(), layer.weight)[0]

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16), OnePixelConvolutions():
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups", "other_way"),
    [
        (1, 1, 1, 1, True),
        (1, 2, 1, 1, True),
        (1, 1, 3, 1, True),
        (1, 1, 1, 6, True),
        (1, 1, (1, 2), 2, True),
        (1, 1, 0, 1, False),
        (2, 1, 1, 1, False),
        (2, 2, 1, 6, False),
    ],
)
def test_outputs_and_gradients_are_those_of_the_convolution(size, stride, padding, groups, bias, other_way) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    sides = padding if isinstance(padding, tuple) else (padding, padding)
    kernel = tuple(2 * side + 1 for side in sides)
    layer = nn.Conv2d(6, 12, kernel, stride, padding, groups=groups, bias=bias).double()
    images = torch.randn(5, 6, size, size, dtype=torch.float64, requires_grad=True)

    def compute() -> list[Tensor]:
        outputs = layer(images)
        gradients = torch.autograd.grad(outputs.square().sum(), [images, *layer.parameters()])
        return [outputs.detach(), *gradients]

    expected = compute()
    with torch.profiler.profile() as profile, OnePixelConvolutions():
        actual = compute()
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other)
    assert other_way != any(event.key == "aten::convolution" for event in profile.key_averages())
