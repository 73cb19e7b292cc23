"""Pre-activation ResNets (He et al. 2016, arXiv 1603.05027) with the parameter names of BackdoorBench's ``preactresnet*``.

Batch norm and ReLU come before each convolution, there are none after the last block, and pooling is adaptive, so any
image size works. State keys and shapes are those of BB's records (``layer2.0.shortcut.0.weight`` ...).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """``[B, inputs, H, W] -> [B, expansion*width, H/stride, W/stride]`` by convolutions of ``kernels``, one of them strided."""

    kernels: tuple[int, ...]
    strided = 0
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        widths = [inputs, *[width] * (len(self.kernels) - 1), outputs]
        for number, kernel in enumerate(self.kernels):
            self.add_module(f"bn{number + 1}", nn.BatchNorm2d(widths[number]))
            step = stride if number == self.strided else 1
            conv = nn.Conv2d(widths[number], widths[number + 1], kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{number + 1}", conv)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.get_submodule("bn1")(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out = self.get_submodule("conv1")(active)
        for number in range(2, len(self.kernels) + 1):
            active = F.relu(self.get_submodule(f"bn{number}")(out))
            out = self.get_submodule(f"conv{number}")(active)
        return out + skip


class BasicBlock(PreActBlock):
    kernels = (3, 3)


class Bottleneck(PreActBlock):
    kernels, strided, expansion = (1, 3, 1), 1, 4


class PreActResNet(nn.Module):
    """``[B, 3, H, W] -> [B, num_classes]`` logits."""

    def __init__(self, block: type[PreActBlock], depths: list[int], num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        inputs = 64
        for number, depth in enumerate(depths, start=1):
            blocks = []
            for position in range(depth):
                blocks.append(block(inputs, 32 * 2**number, stride=2 if number > 1 and position == 0 else 1))
                inputs = 32 * 2**number * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(self.avgpool(x).flatten(1))


BUILDERS: dict[str, tuple[type[PreActBlock], list[int]]] = {
    "preactresnet18": (BasicBlock, [2, 2, 2, 2]),
    "preactresnet34": (BasicBlock, [3, 4, 6, 3]),
    "preactresnet50": (Bottleneck, [3, 4, 6, 3]),
}


def preact_resnet(name: str, num_classes: int) -> PreActResNet:
    """Build one of :data:`BUILDERS` with fresh weights."""
    block, depths = BUILDERS[name]
    return PreActResNet(block, depths, num_classes)
