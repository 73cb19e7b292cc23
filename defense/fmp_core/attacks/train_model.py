"""Training the model that an attack record holds, and what BackdoorBench's attacks report of each epoch."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmp_core.attacks.poisoning import Poison
from fmp_core.attacks.recipes import FOLDER_RECIPE, RECIPES, UNNORMALISED_LR
from fmp_core.data.datasets import DatasetFacts, Split
from fmp_core.errors import UserError
from fmp_core.metrics import METRICS
from fmp_core.models.build import PixelModel
from fmp_core.models.evaluate import Metrics, predict
from fmp_core.models.training import Epoch, Trainer
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device
from fmp_core.system.progress import Progress

LOGGER = logging.getLogger("fmp_core")


def recipe(dataset: str, network: nn.Module) -> dict[str, Any]:
    """Epochs, batch size and learning rate to train ``network`` from scratch on ``dataset``."""
    values = RECIPES.get(dataset, FOLDER_RECIPE)
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    return values if normalised else {**values, "lr": min(values["lr"], UNNORMALISED_LR)}


@dataclass(frozen=True)
class AttackEpoch(Epoch):
    """An epoch as BB's attacks report it (``trainer_cls.py``): accuracies of the clean, and of the poisoned, training images.

    ``train_asr_bd_only`` and ``train_ra_bd_only`` compare predictions on poisoned images with the attacker's and the true
    labels; both are None where nothing is poisoned.
    """

    train_acc_clean_only: float
    train_asr_bd_only: float | None
    train_ra_bd_only: float | None


@dataclass(frozen=True)
class TrainingSet:
    """What the attacked model is trained on.

    Args:
        images: uint8 ``[N, C, H, W]``, the poisoned ones in their places.
        labels: int64 ``[N]``; ``original``: the true ones.
        poisoned: bool ``[N]``; ``cross``: WaNet's noise-mode images.
    """

    images: Tensor
    labels: Tensor
    original: Tensor
    poisoned: Tensor
    cross: Tensor

    def to(self, device: torch.device) -> TrainingSet:
        return TrainingSet(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def training_set(clean: Split, used: Sequence[int], poison: Poison | None) -> TrainingSet:
    """The clean images at the positions ``used``, the poisoned ones in their places."""
    images, original = clean.read(used).clone(), clean.labels[torch.tensor(used, dtype=torch.int64)]
    labels, row_of = original.clone(), {position: row for row, position in enumerate(used)}
    poisoned, cross = torch.zeros(len(labels), dtype=torch.bool), torch.zeros(len(labels), dtype=torch.bool)
    for part, marks in ((poison and poison.train, poisoned), (poison and poison.cross, cross)):
        if part:
            rows = torch.tensor([row_of[position] for position in part.indices], dtype=torch.int64)
            images[rows], labels[rows], marks[rows] = part.images, torch.tensor(part.targets, dtype=torch.int64), True
    return TrainingSet(images, labels, original, poisoned, cross)


class _Counts:
    """Right answers of one epoch in training mode, by kind of image; added up on the device."""

    def __init__(self, data: TrainingSet):
        self.data = data
        self.restart()

    def restart(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.int64, device=self.data.labels.device)

    def add(self, rows: Tensor, predicted: Tensor) -> None:
        data = self.data
        bad = data.poisoned[rows]
        clean = ~(bad | data.cross[rows])
        right, true = predicted == data.labels[rows], predicted == data.original[rows]
        self.sums += torch.stack([(clean & right).sum(), clean.sum(), (bad & right).sum(), (bad & true).sum(), bad.sum()])

    def extend(self, epoch: Epoch) -> AttackEpoch:
        right, clean, hit, true, bad = self.sums.tolist()
        self.restart()
        shares = (hit / bad, true / bad) if bad else (None, None)
        return AttackEpoch(
            **vars(epoch), train_acc_clean_only=right / max(1, clean), **dict(zip(_BD_COLUMNS, shares, strict=True))
        )


_BD_COLUMNS = ("train_asr_bd_only", "train_ra_bd_only")


@dataclass(frozen=True)
class CleanMetrics:
    """What BB's ``prototype.py`` reports of a clean model on the clean test set."""

    test_correct: int
    test_loss_sum_over_batch: float
    test_total: int
    test_loss_avg_over_batch: float
    test_acc: float


def clean_metrics(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> CleanMetrics:
    """Test on uint8 ``images``; ``model`` takes pixels in [0,1] and is left as it was found."""
    predicted, mean = predict(model, images, labels, batch_size)
    correct, batches, loss = int((predicted == labels).sum()), -(-len(labels) // batch_size), float(mean)
    return CleanMetrics(correct, loss * batches, len(labels), loss, correct / len(labels))


def train_attacked_model(
    model: PixelModel,
    data: TrainingSet,
    measure: Callable[[], Metrics | CleanMetrics],
    settings: Settings,
    device: Device,
    facts: DatasetFacts,
    checkpoint: Checkpoint,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Train ``model`` in place, all data on its device, and ``measure`` it after each epoch.

    Resumes from ``checkpoint``, whose notes keep the history. Returns the fields of :class:`AttackEpoch` and of the
    measurement, epoch by epoch.

    Raises:
        UserError: training diverged, or the checkpoint belongs to other settings.
    """
    counts = _Counts(data)
    checkpoint.notes = {"history": []}

    saved = checkpoint.load()
    finished = saved["finished"] if saved else 0
    if finished:
        LOGGER.info("going on after epoch %d of %d", finished, settings.epochs)
    batches = -(-len(data.labels) // settings.batch_size) * (settings.epochs - finished)
    with Progress("Training", batches, "batches", LOGGER) as bar:

        def on_batch(rows: Tensor, predicted: Tensor) -> None:
            counts.add(rows, predicted)
            bar.add()

        for plain in Trainer(settings, device, facts, checkpoint).epochs(model, data.images, data.labels, on_batch=on_batch):
            if not math.isfinite(plain.train_epoch_loss_avg_over_batch):
                raise UserError(f"Training diverged in epoch {plain.epoch + 1}: the loss is not a finite number; lower --lr.")
            epoch, metrics = vars(counts.extend(plain)), vars(measure())
            checkpoint.notes["history"].append((epoch, metrics))
            shown = "  ".join(f"{key[5:]} {metrics[key]:.4f}" for key in METRICS if key in metrics)
            loss = plain.train_epoch_loss_avg_over_batch
            LOGGER.info("epoch %d of %d: loss %.4f  %s", plain.epoch + 1, settings.epochs, loss, shown)
    return [(epoch, metrics) for epoch, metrics in checkpoint.notes["history"]]
