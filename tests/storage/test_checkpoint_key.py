"""A key names the versions and the device, too: what another one computed is not believed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fmp_core.storage import checkpoint
from fmp_core.storage.checkpoint import content_key

IMAGES, LABELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)


def key(images: torch.Tensor = IMAGES) -> str:
    return content_key({"weight": torch.ones(2)}, images, LABELS, {"eps": 0.1})


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(checkpoint, "__version__", "0.0"),
        lambda patch: patch.setattr(torch, "__version__", "0.0"),
    ],
    ids=["FMP", "torch"],
)
def test_another_version_has_another_key(change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    change(monkeypatch)
    assert key() != before


def test_another_device_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU; what is copied from it is the same content as the CPU's."""
    monkeypatch.setattr(checkpoint, "to_host", lambda tensors: [torch.zeros(x.shape, dtype=x.dtype) for x in tensors])
    assert key() == key(IMAGES.clone())
    assert key() != key(IMAGES.to("meta"))
