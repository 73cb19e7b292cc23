"""Pre-activation ResNets (He et al. 2016, arXiv 1603.05027) with the parameter names of BackdoorBench's ``preactresnet*``.

Batch norm and ReLU come before each convolution, there are none after the last block, and pooling is adaptive, so any
image size works. State keys and shapes are those of BB's records
(``layer2.0.shortcut.0.weight`` ...).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ``[B, inputs, H, W] -> [B, width, H/stride, W/stride]``."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = _projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + skip


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; ``[B, inputs, H, W] -> [B, 4*width, H/stride, W/stride]``."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = _projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + skip


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))


class PreActResNet(nn.Module):
    """``[B, 3, H, W] -> [B, num_classes]`` logits."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: list[int], num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        inputs = 64
        for number, depth in enumerate(depths, start=1):
            width = 64 * 2 ** (number - 1)
            blocks = []
            for position in range(depth):
                stride = 2 if number > 1 and position == 0 else 1
                blocks.append(block(inputs, width, stride))
                inputs = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(self.avgpool(x).flatten(1))


BUILDERS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "preactresnet18": (BasicBlock, [2, 2, 2, 2]),
    "preactresnet34": (BasicBlock, [3, 4, 6, 3]),
    "preactresnet50": (Bottleneck, [3, 4, 6, 3]),
}


def preact_resnet(name: str, num_classes: int) -> PreActResNet:
    """Build one of :data:`BUILDERS` with fresh weights."""
    block, depths = BUILDERS[name]
    return PreActResNet(block, depths, num_classes)
