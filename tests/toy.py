"""Small networks whose wiring is known, for tests of tracing, FRG, ranking and pruning. All take ``[B, 3, 8, 8]``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fmp_core.models.preact_resnet import BasicBlock
from torch import Tensor, nn

CLASSES = 5

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
