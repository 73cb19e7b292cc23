"""In which precision a model is trained."""

from __future__ import annotations

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.models import training
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from torch import Tensor, nn


class Looks(nn.Module):
    """Notes what its convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.kinds = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), set[torch.dtype]()

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.conv(pixels)
        self.kinds.add(maps.dtype)
        return self.head(maps.relu().mean((2, 3)))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_for_those_who_allow_it_on_hardware_that_has_it(
    amp: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "has_fast_bfloat16", lambda _device: fast)
    model, images, labels = Looks(), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    facts = DatasetFacts(2, (8, 8, 3), crop_padding=0)
    list(Trainer(Settings(epochs=1, batch_size=4, amp=amp), Device(torch.device("cpu")), facts).epochs(model, images, labels))
    assert model.kinds == {torch.bfloat16 if amp and fast else torch.float32}
    assert model.conv.weight.dtype == torch.float32
