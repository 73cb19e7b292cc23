"""Acc, ASR and RA as BackdoorBench counts them (``utils/trainer_cls.py``, ``test_current_model``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.metrics import METRICS
from fmp_core.models.fast_ops import FastOps
from fmp_core.models.feature_maps import frozen
from fmp_core.system.devices import by_batch, rows_per_batch


@dataclass(frozen=True)
class TestData:
    """Both test sets on the device: images uint8 ``[N, C, H, W]``, labels int64 ``[N]``.

    ``targets`` are the attacker's labels of the poisoned images, of which there may be none, ``originals`` their true ones.
    ``counterparts``: for each poisoned image, the row of the clean image it was made from; -1 where that is not among them;
    None if nothing is known.
    """

    clean_images: Tensor
    clean_labels: Tensor
    poisoned_images: Tensor
    targets: Tensor
    originals: Tensor
    counterparts: Tensor | None = None

    def __len__(self) -> int:
        """How many images one evaluation looks at."""
        return len(self.clean_labels) + len(self.targets)


@dataclass(frozen=True)
class Metrics:
    """Fractions in [0,1]; losses are unweighted means of batch means, as BB's are. None: there is no triggered image."""

    test_acc: float
    test_asr: float | None
    test_ra: float | None
    clean_test_loss_avg_over_batch: float
    bd_test_loss_avg_over_batch: float | None

    def headline(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in METRICS}


class Predictions(NamedTuple):
    """Predicted classes of both test sets, int64 ``[N]`` each, on the model's device."""

    clean: Tensor
    poisoned: Tensor


class Evaluation(NamedTuple):
    """The metrics, and the predictions they were counted from."""

    metrics: Metrics
    predictions: Predictions


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [0,1], as torchvision's ToTensor."""
    return pixels.float().div(255)


def even_sample(labels: Tensor, count: int) -> Tensor:
    """Positions of ``count`` images, ascending, spread evenly over the classes and, within a class, over its images.

    ``labels`` are int64 ``[N]``; all positions if ``count`` is at least N. Draws no random number.
    """
    if count >= len(labels):
        return torch.arange(len(labels), device=labels.device)
    by_class = labels.argsort(stable=True)
    return by_class[torch.arange(count, device=labels.device) * len(labels) // count].sort().values


def predict(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    on_images: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Predicted classes, int64 ``[N]``, and the mean over batches of the cross-entropy against ``labels``, float64 ``[]``.

    Both stay on the device, so nothing waits for a GPU here. ``model`` takes pixels in [0,1] and is left as it was found;
    float32 (TF32 where torch allows it, as in BB).

    Args:
        images: uint8 ``[N, C, H, W]``, N > 0.
        batch_size: shapes the loss only; forward passes have the size that suits the device, less if memory runs out.
        on_images: called after each forward pass with the number of its images.
    """

    def outputs(part: slice) -> Tensor:
        found: Tensor = model(to_unit(images[part]).contiguous(memory_format=torch.channels_last))
        if on_images is not None:
            on_images(len(found))
        return found

    with frozen(model), torch.inference_mode(), FastOps():
        logits = torch.cat(by_batch(len(images), rows_per_batch(images.device), images.device, outputs))
        losses = [F.cross_entropy(*pair) for pair in zip(logits.split(batch_size), labels.split(batch_size), strict=True)]
        return logits.argmax(1), torch.stack(losses).double().mean()


def evaluate(model: nn.Module, data: TestData, batch_size: int, on_images: Callable[[int], None] | None = None) -> Evaluation:
    """Acc on the clean test set; ASR and RA on the poisoned one (the same predictions against both labels)."""
    clean, clean_loss = predict(model, data.clean_images, data.clean_labels, batch_size, on_images)
    if not len(data.targets):
        accuracy = float((clean == data.clean_labels).double().mean())
        return Evaluation(Metrics(accuracy, None, None, float(clean_loss), None), Predictions(clean, data.targets))
    poisoned, poisoned_loss = predict(model, data.poisoned_images, data.targets, batch_size, on_images)
    hits = ((clean, data.clean_labels), (poisoned, data.targets), (poisoned, data.originals))
    counts = [(predicted == labels).sum().double() for predicted, labels in hits]
    right, success, recovered, *losses = torch.stack([*counts, clean_loss, poisoned_loss]).tolist()
    metrics = Metrics(right / len(clean), success / len(poisoned), recovered / len(poisoned), *losses)
    return Evaluation(metrics, Predictions(clean, poisoned))
