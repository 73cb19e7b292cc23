"""Acc, ASR and RA as BackdoorBench counts them (``utils/trainer_cls.py``, ``test_current_model``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.metrics import defense_effectiveness
from fmp_core.models.fast_ops import FastOps
from fmp_core.models.feature_maps import frozen
from fmp_core.system.devices import rows_per_batch


@dataclass(frozen=True)
class TestData:
    """Both test sets on the device: images uint8 ``[N, C, H, W]``, labels int64 ``[N]``.

    ``targets`` are the attacker's labels of the poisoned images, ``originals`` their true ones.
    """

    clean_images: Tensor
    clean_labels: Tensor
    poisoned_images: Tensor
    targets: Tensor
    originals: Tensor


@dataclass(frozen=True)
class Metrics:
    """Fractions in [0,1]; losses are unweighted means of batch means, as BB's are."""

    test_acc: float
    test_asr: float
    test_ra: float
    clean_test_loss_avg_over_batch: float
    bd_test_loss_avg_over_batch: float

    def headline(self) -> dict[str, float]:
        return {"test_acc": self.test_acc, "test_asr": self.test_asr, "test_ra": self.test_ra}


@dataclass(frozen=True)
class Predictions:
    """Predicted classes of both test sets, int64 ``[N]`` each."""

    clean: Tensor
    poisoned: Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0,1], as torchvision's ToTensor."""
    return pixels.float().div(255)


def predict(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Predicted classes, int64 ``[N]``, and the mean over batches of the cross-entropy against ``labels``.

    ``images`` are uint8; ``model`` takes pixels in [0,1] and is left as it was found. float32 (TF32 where torch allows it, as
    in BB); no random number is drawn. ``batch_size`` shapes the loss only; forward passes have the size that suits the
    device.
    """
    with frozen(model), torch.inference_mode(), FastOps():
        rows = rows_per_batch(images.device)
        logits = torch.cat([model(to_unit(part).contiguous(memory_format=torch.channels_last)) for part in images.split(rows)])
        losses = [F.cross_entropy(*pair) for pair in zip(logits.split(batch_size), labels.split(batch_size), strict=True)]
        return logits.argmax(1), float(torch.stack(losses).double().mean())


def evaluate(model: nn.Module, data: TestData, batch_size: int) -> Metrics:
    """Acc on the clean test set; ASR and RA on the poisoned one (the same predictions against both labels)."""
    return evaluate_and_keep(model, data, batch_size)[0]


def evaluate_and_keep(model: nn.Module, data: TestData, batch_size: int) -> tuple[Metrics, Predictions]:
    """As :func:`evaluate`, and the predictions it counted."""
    clean, clean_loss = predict(model, data.clean_images, data.clean_labels, batch_size)
    poisoned, poisoned_loss = predict(model, data.poisoned_images, data.targets, batch_size)
    metrics = Metrics(
        test_acc=_share(clean == data.clean_labels),
        test_asr=_share(poisoned == data.targets),
        test_ra=_share(poisoned == data.originals),
        clean_test_loss_avg_over_batch=clean_loss,
        bd_test_loss_avg_over_batch=poisoned_loss,
    )
    return metrics, Predictions(clean, poisoned)


def defense_effectiveness_rating(before: Metrics, after: Metrics) -> float:
    """DER in [0,1]: half of (ASR drop - Acc drop + 1), gains counted as no drop (BB ``utils/metric.py``)."""
    return defense_effectiveness(before.headline(), after.headline())


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
