"""A model to judge, and the folder that it lies in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from colours import CLASSES, SIZE
from fmp_core.data.datasets import DatasetFacts
from judged import trained


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """Of a model that knows the colours. Not to be changed."""
    return trained(DatasetFacts(CLASSES, (SIZE, SIZE, 3), crop_padding=0))


@pytest.fixture
def place(colours: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``model.pth`` and ``data/colours``."""
    torch.save(weights, colours / "model.pth")
    monkeypatch.chdir(colours)
    return colours
