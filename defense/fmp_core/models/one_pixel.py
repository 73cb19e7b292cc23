"""Convolutions over maps of one pixel, or one row of pixels, as the deep layers of a ResNet have them on small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OnePixelConvolutions(TorchFunctionMode):
    """While active, a zero-padded convolution over one-pixel maps is the matrix product it amounts to; for CPUs.

    There the centre of the kernel alone meets the pixel. oneDNN's weight gradient of such a convolution takes up to ten times
    as long, and in bfloat16 it is partly uninitialised memory (torch 2.14 and 2.15). Over maps of one row or column of pixels
    the latter is so, too, hence float32 for these.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_convolution = func is torch.conv2d and len(args) == 7 and not kwargs
        if is_convolution and _is_product(*args):
            return _product(*args)
        if is_convolution and _is_one_row(args[0]) and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(*(part.float() if isinstance(part, Tensor) else part for part in args))
        return func(*args, **(kwargs or {}))


def _is_one_row(inputs: Tensor) -> bool:
    """Whether maps have one row or one column of several pixels."""
    return min(inputs.shape[-2:]) == 1 < max(inputs.shape[-2:])


def _is_product(inputs: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether the kernel's centre alone meets the one pixel; arguments as :func:`torch.nn.functional.conv2d` gets them."""
    return (
        inputs.shape[-2:] == (1, 1)
        and isinstance(padding, tuple)
        and padding != (0, 0)
        and dilation == (1, 1)
        and weight.shape[-2:] == (2 * padding[0] + 1, 2 * padding[1] + 1)
    )


def _product(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: tuple[int, int], dilation: Any, groups: int
) -> Tensor:
    centre = weight[:, :, padding[0], padding[1]]
    if groups == 1:
        return F.linear(inputs.flatten(1), centre, bias)[:, :, None, None]
    product = torch.einsum("bgi,goi->bgo", inputs.reshape(len(inputs), groups, -1), centre.reshape(groups, -1, centre.shape[1]))
    product = product.reshape(len(inputs), -1, 1, 1)
    return product if bias is None else product + bias.to(product.dtype)[:, None, None]
