"""Small networks whose wiring is known, for tests of tracing, FRG, ranking and pruning. All take ``[B, 3, 8, 8]``.

``narrow_resnet`` is one that records may name: imported here, it is built like any of BackdoorBench's models.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fmp_core.models import build
from fmp_core.models.preact_resnet import BasicBlock
from torch import Tensor, nn
from torchvision.models import list_models
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock as PostActivationBlock

CLASSES = 5

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


NARROW_RESNET, NARROW_RESNET_MAPS = (
    "narrow_resnet",
    {
        "conv1": 8,
        "layer1.0.conv1": 8,
        "layer1.0.conv2": 8,
        "layer2.0.conv1": 16,
        "layer2.0.conv2": 16,
        "layer2.0.downsample.0": 16,
    },
)


class NarrowResNet(nn.Module):
    """torchvision's ResNet with two blocks and few channels; ``[B, 3, H, W]`` for any H, W from 4."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(PostActivationBlock(8, 8))
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.layer2 = nn.Sequential(PostActivationBlock(8, 16, stride=2, downsample=shortcut))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


if NARROW_RESNET not in list_models():
    register_model(NARROW_RESNET)(lambda weights=None, num_classes=10: NarrowResNet(num_classes))
    build.TORCHVISION.append(NARROW_RESNET)


class Toy(nn.Module):
    """A body of convolutions, then global average pooling and a linear head."""

    width = 6

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.width, CLASSES)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Plain(Toy):
    """conv - bn - relu, twice; convolutions with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class PreActivation(Toy):
    """bn - relu - conv with residuals: ``bn1`` consumes the stem; ``last`` consumes a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return F.relu(self.last(out + x))


class PostActivation(Toy):
    """conv - bn - relu with an in-place residual and in-place ReLUs, as torchvision's ResNet; ``last`` is behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.last, self.bn3 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(self.bn3(self.last(self.relu(out))))


class TwoReaders(Toy):
    """One convolution feeds two batch norms; both are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return F.relu(self.left(out)) - F.relu(-self.right(out))


class TwoWriters(Toy):
    """One batch norm is called on the outputs of two convolutions; it belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.left(x))) + F.relu(-self.bn(self.right(x)))


class SumOfTwo(Toy):
    """A batch norm after the sum of two convolutions; it belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.left(x) + self.right(x)))


class InplaceRelu(Toy):
    """An in-place ReLU directly on a convolution's output, then a batch norm, which so reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.bn(self.relu(self.conv1(x)))))


class InplaceSum(Toy):
    """``out += x`` on a convolution's output, then a batch norm: the same tensor object, but a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv(F.relu(x))
        out += x
        return F.relu(self.bn(out))


class Depthwise(Toy):
    """Pointwise, depthwise and grouped convolutions with batch norms and ReLU6, as the mobile networks."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.grouped, self.bn3 = nn.Conv2d(6, 6, 1, groups=2), nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        return self.bn3(self.grouped(x))


class NormTwiceOnOne(Toy):
    """A batch norm called twice, both times on the output of one convolution; it is that convolution's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return F.relu(self.bn(out)) + 0.5 * self.bn(out).sigmoid()


class NormTwiceOnTwo(Toy):
    """A batch norm called on a convolution's output, and again on its own result; it belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(F.relu(self.bn(self.conv(x)))))


class OutOfOrder(Toy):
    """Registered last to first: ``shortcut, bn_b, conv_b, bn_a, conv_a``; run ``conv_a, bn_a, conv_b, bn_b, shortcut``."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(3, 6, 1, bias=False)
        self.bn_b, self.conv_b = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn_a, self.conv_a = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 3, padding=1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_a(self.conv_a(x)))
        out = self.bn_b(self.conv_b(out))
        return F.relu(out + self.shortcut(x))


class SmallPreActResNet(Toy):
    """Two blocks of the real PreActResNet, the second with stride and projection."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1, self.layer2 = BasicBlock(4, 4, 1), BasicBlock(4, 8, 2)

    def body(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.conv1(x)))


class InplaceReluSkip(Toy):
    """An in-place ReLU whose input is read again later: the skip carries the rectified map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.conv(self.relu(x)) + x


class OddConvs(Toy):
    """Lopsided ``same`` padding, dilation, reflected padding, strides that leave a rest, a batch norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.bn = nn.Conv2d(3, 6, 2, padding="same", dilation=2), nn.BatchNorm2d(6, affine=False)
        self.reflected = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.tall, self.strided = nn.Conv2d(6, 6, (3, 1), stride=(2, 3)), nn.Conv2d(6, 6, 2, stride=2, padding=(1, 0))

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.same(x)))
        x = F.gelu(self.reflected(x))
        return self.strided(torch.relu(self.tall(x)))


class ConvTwice(Toy):
    """The same convolution is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(self.stem(x))))


class NoConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


NETS = (
    Plain,
    PreActivation,
    PostActivation,
    TwoReaders,
    TwoWriters,
    SumOfTwo,
    InplaceRelu,
    InplaceSum,
    Depthwise,
    NormTwiceOnOne,
    NormTwiceOnTwo,
    OutOfOrder,
    SmallPreActResNet,
    InplaceReluSkip,
)  # every one whose batch norms have weights


class Normalised(nn.Module):
    """Pixels in [0,1] -> the network behind a normalisation, as fmp_core.models.build.PixelModel."""

    def __init__(self, network: nn.Module, mean: float = 0.5, std: float = 0.25):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - self.mean) / self.std)


@torch.no_grad()
def toy_model(kind: type[nn.Module], images: Tensor, seed: int = 0) -> Normalised:
    """A ``kind`` in evaluation mode with random weights and batch norms, its head balanced so that ``images`` get several
    classes with small margins: an attack then changes some predictions, not none and not all."""
    generator = torch.Generator().manual_seed(seed)
    network = kind()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scale = module.weight[0].numel() ** -0.5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 1.5 * scale)
            if module.bias is not None:
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
        elif isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            if module.affine:
                module.weight.copy_(0.5 + torch.rand(shape, generator=generator))
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.2)
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.2)
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    model = Normalised(network).eval()
    logits = model(images)
    network.head.bias -= logits.mean(0)
    return model


def toy_images(count: int = 12, seed: int = 0, size: int = 8) -> Tensor:
    """Pixels in [0,1], some of them exactly 0 or 1 so that clamping matters."""
    noise = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1000 + seed))
    return (noise * 1.3 - 0.15).clamp(0, 1)


def toy_case(kind: type[nn.Module], count: int = 12, seed: int = 0) -> tuple[Normalised, Tensor, Tensor]:
    """Model, images, and the model's own predictions as labels."""
    images = toy_images(count, seed)
    model = toy_model(kind, images, seed)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def footprint(model: nn.Module) -> tuple[dict[str, object], int]:
    """Everything a function could leave behind: training and gradient flags, gradients, and the number of hooks."""
    flags: dict[str, object] = {f"training {name}": module.training for name, module in model.named_modules()}
    flags |= {f"requires_grad {name}": parameter.requires_grad for name, parameter in model.named_parameters()}
    flags |= {f"grad {name}": parameter.grad is None for name, parameter in model.named_parameters()}
    hooks = 0
    for module in model.modules():
        for store in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks += len(getattr(module, store))
    return flags, hooks


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stranger:
    """A class of nobody's library, for records that hold an object of it."""
