"""Fine-tuning and testing on CUDA: interrupted and repeated training, autocast, and what makes the host wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.models.evaluate import TestData as BothTestSets
from fmp_core.models.evaluate import evaluate
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.models.pruning import parts_of, set_to_zero
from fmp_core.models.training import Epoch, Trainer, _InBfloat16
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import choose_device, has_fast_bfloat16
from scoring import score_feature_maps
from torch import nn
from toy import SmallPreActResNet, needs_cuda
from toy_cases import same, toy_case, weights
from waits import CountWaits

FACTS = DatasetFacts(5, (8, 8, 3), flip=True, crop_padding=2)
on_cuda = [pytest.mark.cuda, needs_cuda]
# On a CPU for `make test-all`: torch 2.14 aborted twice in a dispatch mode's backward pass with kernels held back to AVX2.
everywhere = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda:0", marks=on_cuda)]
)


@pytest.mark.cuda
@needs_cuda
def test_a_thread_of_data_parallel_computes_in_bfloat16() -> None:
    seen: list[torch.dtype] = []
    layer = nn.Linear(2, 2, device="cuda")
    thread = threading.Thread(target=lambda: seen.append(_InBfloat16(layer, True)(torch.ones(1, 2, device="cuda")).dtype))
    thread.start()
    thread.join()
    assert seen == [torch.bfloat16]


def start(device: str = "cuda:0", checkpoint: Checkpoint | None = None, **changes: Any) -> tuple[nn.Module, Iterator[Epoch]]:
    """A model, and its training on ten images in batches of four."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    model, images, labels = toy_case(SmallPreActResNet, count=10)
    settings = Settings(**{"epochs": 3, "batch_size": 4, "amp": False, **changes})
    chosen = choose_device(device)
    pixels, labels = images.mul(255).byte().to(chosen.device), labels.to(chosen.device)
    return model.to(chosen.device), Trainer(settings, chosen, FACTS, checkpoint).epochs(model, pixels, labels)


@pytest.mark.cuda
@needs_cuda
def test_two_trainings_have_the_same_bits_and_one_that_goes_on_too(tmp_path: Path) -> None:
    (first, epochs), (second, again) = start(), start()
    history = list(epochs)
    assert list(again) == history and same(weights(first), weights(second))
    checkpoint = Checkpoint(tmp_path / "interrupted.pt", {})
    _, interrupted = start(checkpoint=checkpoint)
    assert [next(interrupted), next(interrupted)] == history[:2]
    interrupted.close()  # type: ignore[attr-defined]
    assert torch.load(checkpoint.path, weights_only=True)["state"]["finished"] == 1  # saved as the next epoch is asked for
    third, rest = start(checkpoint=checkpoint)
    assert list(rest) == history[1:] and same(weights(first), weights(third))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or not has_fast_bfloat16(torch.device("cuda:0")), reason="needs bfloat16 in hardware"
)
def test_autocast_learns_nearly_the_same_in_float32_weights() -> None:
    (plain, epochs), (rough, again) = start(), start(amp=True)
    losses, rough_losses = ([epoch.train_epoch_loss_avg_over_batch for epoch in history] for history in (epochs, again))
    assert losses != rough_losses and losses == pytest.approx(rough_losses, rel=0.05)
    for name, value in rough.state_dict().items():
        assert value.dtype == plain.state_dict()[name].dtype
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0.1, atol=0.05)


@everywhere
def test_the_host_waits_for_no_batch_of_an_epoch_or_an_evaluation(device: str) -> None:
    def waits(batch_size: int) -> tuple[int, int]:
        model, epochs = start(device, batch_size=batch_size, epochs=1)
        with CountWaits() as training:
            list(epochs)
        images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8, device=device)
        labels = torch.zeros(10, dtype=torch.int64, device=device)
        with CountWaits() as testing:
            evaluate(model, BothTestSets(images, labels, images, labels, labels), batch_size)
        return training.count, testing.count

    assert waits(10) == waits(2)


@everywhere
def test_the_host_waits_for_no_mask_of_a_batch(device: str) -> None:
    model, images, _ = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    model.to(device)
    pruned = parts_of(layers, {layer.name: torch.arange(layer.channels) % 2 == 0 for layer in layers})
    with CountWaits() as counted:
        set_to_zero(pruned)
    assert counted.count == 0 and not any(layer.module.weight[::2].any() for layer in layers)


@everywhere
def test_the_host_waits_for_no_group_of_maps(device: str) -> None:
    model, images, labels = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    model, images, labels = model.to(device), images.to(device), labels.to(device)

    def waits(rows: int) -> int:
        with CountWaits() as counted:
            score_feature_maps(model, layers, images, labels, eps=0.1, rows=rows)
        return counted.count

    assert waits(24) == waits(240)
