"""Models with a planted backdoor and images they classify, for tests of trigger inversion."""

from __future__ import annotations

import torch
from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.trigger import (
    WARPS,
    InvertedTrigger,
)
from fmp_core.models.feature_maps import ConvLayer
from torch import Tensor, nn

CLASSES, TARGET, BAD = 4, 2, 5


class Planted(nn.Module):
    """Four classes, by which of four columns is brightest, and a backdoor: map 5, whose last 4x4 patch is ``trigger``."""

    def __init__(self, trigger: Tensor | None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        with torch.no_grad():
            self.conv.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
            self.conv.bias.zero_()
            for column in range(CLASSES):
                self.conv.weight[column] = 1 / 48
            self.conv.weight[BAD], self.conv.bias[BAD] = 0, -1
            if trigger is not None:  # 1 where a patch is the trigger, falling with every other pixel
                self.conv.weight[BAD] = (2 * trigger - 1) / 24
                self.conv.bias[BAD] = 1 - float(trigger.sum()) / 24

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        columns = torch.stack([maps[:, c, :, c].mean(1) for c in range(CLASSES)], 1)
        alarm = 30 * torch.nn.functional.softplus(4 * (maps[:, BAD, -1, -1] - 0.6))
        return 20 * columns + torch.eye(CLASSES)[TARGET] * alarm[:, None]


def images_of(count: int = 400) -> tuple[Tensor, Tensor]:
    """uint8 ``[count, 3, 16, 16]``, grey noise with one column brighter, and the classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(90, 130, (count, 3, 16, 16), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, :12, 4 * label : 4 * label + 4] += 60
    return images.to(torch.uint8), labels


def trigger_search(trigger: Tensor | None) -> TriggerSearch:
    images, labels = images_of()
    model = Planted(trigger)
    layers = [ConvLayer("conv", model.conv)]
    assert (model(images[:8] / 255).argmax(1) == labels[:8]).all()
    return TriggerSearch(model, layers, images, labels, torch.float32, seed=0)


WHITE = torch.ones(3, 4, 4)


class PlantedAllToAll(Planted):
    """A planted patch that turns the class of an image into the next one."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        columns = torch.stack([maps[:, c, :-1, c].mean(1) for c in range(CLASSES)], 1)
        alarm = torch.sigmoid(12 * maps[:, BAD, -1:, -1])
        return 20 * ((1 - alarm) * columns + alarm * columns.roll(1, 1))


class PlantedWarp(nn.Module):
    """Two classes, by whether an edge lies left of column 5, and a third, for an edge that lies between two columns."""

    def forward(self, x: Tensor) -> Tensor:
        profile = x.mean((1, 2))  # [B, W], about 0 left of the edge and about 1 right of it
        edge = x.shape[3] - profile.sum(1) - 0.5
        between = (profile * (1 - profile)).amax(1)  # 0 where every column is black or white, 1/4 where one is halfway
        return torch.stack([5 - edge, edge - 5, 80 * between - 8], 1)


def edges(count: int) -> tuple[Tensor, Tensor]:
    """uint8 ``[count, 3, 12, 12]``: black left of an edge and white right of it, and on which side of column 5 the edge is."""
    places = torch.randint(2, 5, (count,), generator=torch.Generator().manual_seed(2)) + torch.arange(count) % 2 * 4
    columns = torch.arange(12).expand(count, 3, 12, 12)
    return (columns >= places[:, None, None, None]).to(torch.uint8) * 255, (places > 5).to(torch.int64)


def a_trigger(family: str, value: float) -> InvertedTrigger:
    where = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    where[..., :2, :2] = True
    return InvertedTrigger(family, 1, torch.full((1, 2 if family in WARPS else 3, 16, 16), value), where)
