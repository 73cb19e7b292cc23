"""A small network with its clean images, and a selection of its feature maps by any settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import trigger
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.selection.choice import Selection
from fmp_core.selection.select import select_feature_maps
from fmp_core.settings import Settings
from fmp_core.system.cli import Stages
from toy import CLASSES, SmallPreActResNet
from toy_cases import toy_images, toy_model


@pytest.fixture
def defender(monkeypatch: pytest.MonkeyPatch) -> DefenderInputs:
    for name, fewer in (("STEPS", 2), ("SPARSE_BATCH", 4), ("DENSE_BATCH", 4)):
        monkeypatch.setattr(trigger, name, fewer)
    images = toy_images(24)
    model = toy_model(SmallPreActResNet, images)
    layers = trace_conv_layers(model.network, images[:1])
    pixels = (images * 255).round().to(torch.uint8)
    with torch.no_grad():
        labels = model(pixels / 255).argmax(1)
    return DefenderInputs(model, layers, pixels, labels, CLASSES, DatasetFacts(CLASSES, (8, 8, 3)))  # type: ignore[arg-type]


@pytest.fixture
def selecting(defender: DefenderInputs, tmp_path: Path) -> Callable[..., Selection]:
    def call(**settings: Any) -> Selection:
        return select_feature_maps(defender, Settings(**{"frg_samples": 2, "p": 2, **settings}), tmp_path, Stages())

    return call
