"""Cheaper forms of what a frozen network computes, switched in by a function mode: the network itself is untouched.

Ranking runs thousands of backward passes through one retained graph: what is saved per pass counts (``docs/performance.md``).

* batch norm in evaluation mode is one multiplication and addition, and a ReLU after it only masks: both together are a single
  multiplication on the way back;
* on a CPU, oneDNN's convolutions are 2-3 times slower than a matrix product where the output has few positions (4x4): in
  bfloat16, for kernels of one pixel, and on CPUs with AMX always (on an AMD EPYC in float32 oneDNN is faster otherwise);
* with a low-precision ``dtype``, the first convolution stays in float32, because bfloat16 cannot hold a pixel plus 1/255, and
  ReLUs can replay the masks of a float32 pass: with those a bfloat16 gradient of a trained PreActResNet18 keeps the sign of
  99.9 % of its float32 pixels, without them of 85-96 %.

And two that cost a little, on a CPU, without which the chunk would decide near ties between feature maps. Matrix products run
in tiles of one size: MKL and oneDNN choose a kernel by the number of rows, and kernels round differently. (Those of torch's
multi-head attention do not: it hides them from function modes.) Smooth activations run on whole vectors: what is left over at
the end of a tensor rounds differently.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fmp_core.system.devices import has_amx

FEW_POSITIONS = 16  # output positions up to which a matrix product beats oneDNN's convolution
TILE, IMAGE_TILE = 256, 64  # most rows of a matrix product, and images that they come from
VECTOR = 64  # numbers; more than a CPU's widest vector holds


class ConvCall(NamedTuple):
    """One call of ``conv2d``: its input as the network passed it, and its arguments with explicit zero padding."""

    input: Tensor
    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class FastOps(TorchFunctionMode):
    """While active, convolutions, batch norms and ReLUs of an evaluation-mode network run in their cheaper forms.

    Args:
        dtype: of activations; weights of all but the first convolution are expected in it.
        on_convolution: ``id`` of a convolution's weight -> called with the :class:`ConvCall` and its output; what it changes
            in place does not reach the network.
        record: a list that every ReLU appends its mask to.
        replay: masks to use instead of a ReLU's own, in order.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        on_convolution: Mapping[int, Callable[[ConvCall, Tensor], None]] | None = None,
        record: list[Tensor] | None = None,
        replay: Iterator[Tensor] | None = None,
    ):
        super().__init__()
        self.dtype, self.on_convolution, self.record, self.replay = dtype, on_convolution or {}, record, replay

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = [_current(arg) for arg in args], {key: _current(value) for key, value in (kwargs or {}).items()}
        if func in _SMOOTH and args[0].device.type == "cpu" and args[0].numel() % VECTOR:
            plain = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
            out = _padded(lambda whole: func(whole, *args[1:], **plain), args[0])
            if kwargs.get("inplace"):
                args[0].fmp_current = out  # as an in-place ReLU does
            return out
        if func in (torch.relu_, Tensor.relu_):
            return self._relu(args[0], inplace=True)
        cheaper = {torch.conv2d: self._conv2d, F.linear: _linear, F.batch_norm: _batch_norm}
        cheaper |= dict.fromkeys((F.relu, torch.relu, Tensor.relu), self._relu)
        return cheaper.get(func, func)(*args, **kwargs)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        mask = next(self.replay) if self.replay is not None else None
        if torch.is_grad_enabled() and input.requires_grad:
            normalised: Any = getattr(input, "fmp_normalised_from", (None, None))
            source, version = normalised
            fused = source is not None and version == input._version  # not if a skip was added to it since
            out = _ScaleShiftReLU.apply(*source, mask) if fused else _MaskedReLU.apply(input, mask)
            if inplace:
                input.fmp_current = out  # type: ignore[attr-defined]  # whoever reads the input again gets this
            return out
        out = torch.relu_(input) if inplace else torch.relu(input)
        if self.record is not None:
            self.record.append(out > 0)
        return out

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        stride, dilation = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            input, padding = _pad_as_named(input, weight, padding, dilation), 0
        call = ConvCall(input.to(weight.dtype), weight, stride, _pair(padding), dilation, groups)
        out = _convolve(call, bias)
        if id(weight) in self.on_convolution:
            self.on_convolution[id(weight)](call, out)
            out = out.clone()
        return out.to(self.dtype)


def to_precision(model: nn.Module, first_conv: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` with weights in ``dtype``; ``model`` itself if that is float32.

    The first convolution, batch norms, the last linear layer and the model's own buffers (its normalisation) stay float32.
    A model that ends in a convolution (SqueezeNet) has logits in ``dtype``.
    """
    if dtype == torch.float32:
        return model
    low_precision = copy.deepcopy(model)
    counterpart = dict(zip(model.modules(), low_precision.modules(), strict=True))
    linear = [module for module in low_precision.modules() if isinstance(module, nn.Linear)]
    kept = {low_precision, counterpart[first_conv], *linear[-1:]}
    for module in low_precision.modules():
        if module not in kept and not isinstance(module, _BatchNorm):
            for part in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                part.data = part.data.to(dtype) if part.is_floating_point() else part.data
    return low_precision


def _current(arg: Any) -> Any:
    """An argument as an in-place ReLU left it; such ReLUs run out of place where gradients are wanted."""
    if isinstance(arg, Tensor):
        return getattr(arg, "fmp_current", arg)
    return type(arg)(_current(part) for part in arg) if type(arg) in (list, tuple) else arg


def _pair(value: Any) -> tuple[int, int]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return int(values[0]), int(values[-1])


def _pad_as_named(input: Tensor, weight: Tensor, name: str, dilation: tuple[int, int]) -> Tensor:
    """``same`` padding made explicit: it is lopsided for even kernels."""
    if name == "valid":
        return input
    height, width = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    return F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))


def _convolve(call: ConvCall, bias: Tensor | None) -> Tensor:
    input, weight, stride, padding, dilation, groups = call
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    few = out_size[0] * out_size[1] <= FEW_POSITIONS
    pays = weight.dtype == torch.bfloat16 or has_amx() or weight[0, 0].numel() == 1
    if few and pays and groups == 1 and dilation == (1, 1) and input.device.type == "cpu":
        out = _MatrixConv.apply(input, weight, stride, padding)
        return out if bias is None else out + bias.view(1, -1, 1, 1)
    return torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)


_SMOOTH = (F.silu, F.gelu, torch.sigmoid, torch.tanh)


def _padded(function: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    flat = input.flatten()
    return function(F.pad(flat, (0, -len(flat) % VECTOR)))[: len(flat)].view(input.shape)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    input = input.to(weight.dtype)
    if input.device.type != "cpu":
        return F.linear(input, weight, bias)
    out = _in_tiles(input.flatten(0, -2), lambda rows: F.linear(rows, weight, bias), math.prod(input.shape[1:-1]))
    return out.view(*input.shape[:-1], -1)


def _in_tiles(rows: Tensor, product: Callable[[Tensor], Tensor], per_image: int) -> Tensor:
    """``product(rows)``, some rows at a time: how many depends on those ``per_image``, not on the number of images."""
    size = min(TILE, IMAGE_TILE * per_image)
    tiles = F.pad(rows, (0, 0, 0, -len(rows) % size)).split(size)
    return torch.cat([product(tile) for tile in tiles])[: len(rows)]


class _MatrixConv(torch.autograd.Function):
    """A convolution as one matrix product over gathered patches; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        outputs, channels, kh, kw = weight.shape
        padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1).contiguous()
        count, height, width, _ = padded.shape
        oh, ow = (height - kh) // stride[0] + 1, (width - kw) // stride[1] + 1
        b, h, w, c = padded.stride()
        patches = padded.as_strided((count, oh, ow, kh, kw, channels), (b, h * stride[0], w * stride[1], h, w, c))
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
        ctx.save_for_backward(weight)
        ctx.geometry = (padded.shape, stride, padding)
        product = _in_tiles(patches.reshape(count * oh * ow, -1), lambda rows: F.linear(rows, matrix), oh * ow)
        return product.view(count, oh, ow, outputs).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        shape, stride, padding = ctx.geometry
        outputs, channels, kh, kw = weight.shape
        grad = grads[0].permute(0, 2, 3, 1)
        count, oh, ow, _ = grad.shape
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
        product = _in_tiles(grad.reshape(-1, outputs), lambda rows: rows @ matrix, oh * ow)
        patches = product.view(count, oh, ow, kh, kw, channels)
        padded = grad.new_zeros(shape)
        for y in range(kh):
            for x in range(kw):
                padded[:, y : y + oh * stride[0] : stride[0], x : x + ow * stride[1] : stride[1]] += patches[:, :, :, y, x]
        inside = padded[:, padding[0] : shape[1] - padding[0], padding[1] : shape[2] - padding[1]]
        return inside.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), None, None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or input.dim() != 4:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not (torch.is_grad_enabled() and input.requires_grad):
        return torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False)
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    source = (input, scale.to(input.dtype).view(1, -1, 1, 1), shift.to(input.dtype).view(1, -1, 1, 1))
    out = _ScaleShift.apply(*source)
    out.fmp_normalised_from = (source, out._version)
    return out


class _Scaled(torch.autograd.Function):
    """An operation whose gradient is a saved factor times that of its output."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None, None


class _ScaleShift(_Scaled):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, input, scale)


class _ScaleShiftReLU(_Scaled):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.addcmul(shift, input, scale).relu_()
        ctx.save_for_backward((out > 0 if mask is None else mask) * scale)
        return out


class _MaskedReLU(_Scaled):
    @staticmethod
    def forward(ctx: Any, input: Tensor, mask: Tensor | None) -> Tensor:
        out = input.relu()
        ctx.save_for_backward((out > 0 if mask is None else mask).to(input.dtype))
        return out
