"""Training the model that an attack record holds, and what BackdoorBench's attacks report of each epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmp_core.attacks.poisoning import Poison
from fmp_core.attacks.recipes import FOLDER_RECIPE, RECIPES, UNNORMALISED_LR
from fmp_core.data.datasets import DatasetFacts, Split
from fmp_core.errors import UserError
from fmp_core.metrics import METRICS
from fmp_core.models.build import PixelModel
from fmp_core.models.evaluate import predict
from fmp_core.models.training import Epoch, Trainer
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device
from fmp_core.system.progress import Progress

LOGGER = logging.getLogger("fmp_core")
History = list[tuple[dict[str, Any], dict[str, Any]]]  # the fields of each epoch, and the metrics after it


def recipe(dataset: str, network: nn.Module) -> dict[str, Any]:
    """Epochs, batch size and learning rate to train ``network`` from scratch on ``dataset``."""
    values = RECIPES.get(dataset, FOLDER_RECIPE)
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    return values if normalised else {**values, "lr": min(values["lr"], UNNORMALISED_LR)}


@dataclass(frozen=True)
class AttackEpoch(Epoch):
    """An epoch as BB's attacks report it (``trainer_cls.py``): accuracies of the clean, and of the poisoned, training images.

    ``train_asr_bd_only`` and ``train_ra_bd_only`` compare predictions on poisoned images with the attacker's and the true
    labels. None where there is no such image.
    """

    train_acc_clean_only: float | None
    train_asr_bd_only: float | None
    train_ra_bd_only: float | None


class TrainingSet(NamedTuple):
    """What the attacked model is trained on: images uint8 ``[N, C, H, W]``, the poisoned ones in their places, their labels and
    original labels (int64 ``[N]``), and which are poisoned or WaNet's noise-mode images (bool ``[N]``)."""

    images: Tensor
    labels: Tensor
    original: Tensor
    poisoned: Tensor
    cross: Tensor


def training_set(clean: Split, used: Sequence[int], poison: Poison | None) -> TrainingSet:
    """The clean images at the positions ``used``, the poisoned ones in their places."""
    images, original = clean.read(used).clone(), clean.labels[torch.tensor(used, dtype=torch.int64)]
    labels, row_of = original.clone(), {position: row for row, position in enumerate(used)}
    poisoned, cross = torch.zeros(2, len(labels), dtype=torch.bool)
    for part, marks in ((poison and poison.train, poisoned), (poison and poison.cross, cross)):
        if part:
            rows = torch.tensor([row_of[position] for position in part.indices], dtype=torch.int64)
            images[rows], labels[rows], marks[rows] = part.images, torch.tensor(part.targets, dtype=torch.int64), True
    return TrainingSet(images, labels, original, poisoned, cross)


def clean_metrics(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> dict[str, float]:
    """What BB's ``prototype.py`` reports of a clean model on uint8 ``images``; ``model`` is left as it was found."""
    predicted, mean = predict(model, images, labels, batch_size)
    correct, batches, loss = int((predicted == labels).sum()), -(-len(labels) // batch_size), float(mean)
    return {
        "test_correct": correct,
        "test_loss_sum_over_batch": loss * batches,
        "test_total": len(labels),
        "test_loss_avg_over_batch": loss,
        "test_acc": correct / len(labels),
    }


def train_attacked_model(
    model: PixelModel,
    data: TrainingSet,
    measure: Callable[[], dict[str, float]],
    settings: Settings,
    device: Device,
    facts: DatasetFacts,
    checkpoint: Checkpoint,
) -> History:
    """Train ``model`` in place, on its device, and ``measure`` it after each epoch.

    Resumes from ``checkpoint``, whose notes keep the history. Raises UserError if training diverges, or the checkpoint belongs
    to other settings.
    """
    data = TrainingSet(*(part.to(device.device) for part in data))
    checkpoint.notes = {"history": []}
    saved = checkpoint.load()
    finished = saved["finished"] if saved else 0
    if finished:
        LOGGER.info("going on after epoch %d of %d", finished, settings.epochs)
    batches = -(-len(data.labels) // settings.batch_size) * (settings.epochs - finished)
    counts = torch.zeros(5, dtype=torch.int64, device=data.labels.device)
    with Progress("Training", batches, "batches", LOGGER) as bar:

        def on_batch(rows: Tensor, predicted: Tensor) -> None:
            bad = data.poisoned[rows]
            clean = ~(bad | data.cross[rows])
            right, true = predicted == data.labels[rows], predicted == data.original[rows]
            counts.add_(torch.stack([clean & right, clean, bad & right, bad & true, bad]).sum(1))
            bar.add()

        for plain in Trainer(settings, device, facts, checkpoint).epochs(model, data.images, data.labels, on_batch=on_batch):
            loss = plain.train_epoch_loss_avg_over_batch
            if not math.isfinite(loss):
                raise UserError(f"Training diverged in epoch {plain.epoch + 1}: the loss is not a finite number; lower --lr.")
            right, clean, hit, true, bad = counts.tolist()
            counts.zero_()
            epoch = AttackEpoch(
                **vars(plain),
                train_acc_clean_only=right / clean if clean else None,
                train_asr_bd_only=hit / bad if bad else None,
                train_ra_bd_only=true / bad if bad else None,
            )
            metrics = measure()
            checkpoint.notes["history"].append((vars(epoch), metrics))
            shown = "  ".join(f"{key[5:]} {metrics[key]:.4f}" for key in METRICS if key in metrics)
            LOGGER.info("epoch %d of %d: loss %.4f  %s", plain.epoch + 1, settings.epochs, loss, shown)
    return checkpoint.notes["history"]
