"""A small network that records may name: imported here, it is built like any of BackdoorBench's models."""

from __future__ import annotations

import torch.nn.functional as F
from fmp_core.models import build
from torch import Tensor, nn
from torchvision.models import list_models
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock as PostActivationBlock

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
