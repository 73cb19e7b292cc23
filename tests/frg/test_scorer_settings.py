"""What ranking asks of the hardware, and how much memory it keeps."""

from __future__ import annotations

import torch
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.system.devices import min_exact_rows
from scoring import score_feature_maps
from torch import Tensor
from toy import Plain
from toy_cases import toy_case


class Asks(Plain):
    """Notes how a GPU would be asked to compute its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[tuple[bool, bool]] = set()

    def body(self, x: Tensor) -> Tensor:
        self.asked.add((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return super().body(x)


def test_a_gpu_ranks_by_the_same_kernels_and_without_tf32() -> None:
    """TF32 would blur the difference of two nearly equal maps."""
    model, images, labels = toy_case(Asks)
    with torch.backends.cudnn.flags(enabled=True, deterministic=False, allow_tf32=True):
        layers = trace_conv_layers(model.network, images[:1])
        model.network.asked.clear()
        score_feature_maps(model, layers, images, labels, eps=0.1)
        assert model.network.asked == {(True, False)}
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32) == (False, True)


def test_memory_limits_the_rows_of_a_batch() -> None:
    model, images, labels = toy_case(Plain)
    layers = trace_conv_layers(model.network, images[:1])

    def rows(wanted: int | None, memory: int | None) -> int:
        return FeatureMapScorer(model, layers, images, labels, FrgSettings(0.1), batching=Batching(wanted, memory)).rows

    least = min_exact_rows(images.device)
    few, many = rows(10**9, 64), rows(10**9, 256)
    assert least < few and 4 * few <= many < 4 * (few + 1)
    assert rows(least + 1, 64) == least + 1 and rows(1, None) == least
    kept = 2 * sum(layer.channels for layer in layers) * 8 * 8 * 4  # bytes of clean maps and differences of one image, at least
    assert few <= 64 * 2**20 / kept
