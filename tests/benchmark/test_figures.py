"""The figures of the benchmark, worked out on paper from seconds that are given."""

from __future__ import annotations

import math
from argparse import Namespace
from functools import partial
from typing import Any

import pytest
import torch
from fmp_core.benchmark import measure
from fmp_core.data.datasets import FACTS
from fmp_core.models.build import PixelModel, build_model
from narrow_resnet import NARROW_RESNET, NARROW_RESNET_MAPS

# A convolution's output positions at 32x32, and its weights, in the order of the run.
COSTS = [256 * 216, 256 * 576, 256 * 576, 64 * 1152, 64 * 2304, 64 * 128]
SECONDS = {"forward_passes": 0.5, "<lambda>": 4.0, "forward": 1.0, "with_gradient": 3.0, "released_scheme": 2.0}


def told(work: Any, *_: object, **__: object) -> float:
    """Instead of measuring: so many seconds for the work of that name."""
    return SECONDS[(work.func if isinstance(work, partial) else work).__name__]


def test_a_batch_that_does_not_fit_is_no_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 images with gradients take 17 GiB of a GPU."""
    sizes: list[int] = []

    def crowded(work: Any, *_: object) -> float:
        sizes.append(len(work.args[0]))
        if sizes[-1] >= limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    monkeypatch.setattr(measure, "CEILING_BATCHES", {"cpu": (2, 4, 8)})
    monkeypatch.setattr(measure, "seconds", crowded)
    model, images = PixelModel(build_model(NARROW_RESNET, 10), FACTS["cifar10"]), torch.rand(3, 3, 32, 32)
    limit = 8
    assert measure.ceilings(model, torch.float32, images) == [4.0, 4.0] and sizes == [2, 4, 8] * 2
    limit = 2
    with pytest.raises(torch.OutOfMemoryError):
        measure.ceilings(model, torch.float32, images)


def test_the_figures_follow_from_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CEILING_BATCHES", {"cpu": (4, 8)})
    monkeypatch.setattr(measure, "seconds", told)
    args = Namespace(result_file=None, model=NARROW_RESNET, device="cpu", images=40, maps=36, chunk=16, memory=None)
    args.against, args.operations = "released", False
    found = measure.measure(args, torch.float32)
    channels = list(NARROW_RESNET_MAPS.values())
    total = sum(channels)
    shared = 0.5 * math.ceil(40 / measure.make_scorer(args, torch.float32).rows)
    ranked = total * 40 / (shared + (4.0 - shared) * total / 36)  # every second map was scored
    assert found["engine_map_images_per_s"] == pytest.approx(ranked)
    assert (found["ceiling_forward_images_per_s"], found["ceiling_input_grad_images_per_s"]) == (8, pytest.approx(8 / 3))
    assert found["released_map_images_per_s"] == pytest.approx(32 * total / (2.0 * total))  # a batch of 32
    assert found["ratio_vs_released"] == pytest.approx(ranked / 16)
    depths = [sum(COSTS[: number + 1]) / sum(COSTS) for number in range(len(COSTS))]
    backward = sum(depth * count for depth, count in zip(depths, channels, strict=True)) / total * (3 / 8 - 1 / 8)
    assert found["efficiency"] == pytest.approx(ranked * (1 / 8 + backward))
