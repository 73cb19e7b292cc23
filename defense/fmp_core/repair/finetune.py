"""FMP's fine-tuning (paper, Algorithm 1, line 14): the pruned model learns from the clean subset again, tested meanwhile."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from fmp_core.data.datasets import DatasetFacts
from fmp_core.frg.scorer import Choice
from fmp_core.models.evaluate import Metrics
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.models.pruning import prune_feature_maps
from fmp_core.models.training import Epoch, train
from fmp_core.repair.distillation import Teacher
from fmp_core.selection.cache import content_key
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device
from fmp_core.system.progress import Progress

TRAINING: tuple[str, ...] = ("batch_size", "lr", "lr_scheduler", "steplr_stepsize", "steplr_gamma", "steplr_milestones")
TRAINING += ("sgd_momentum", "wd", "amp", "epochs", "random_seed", "masked", "unlearn", "distill")
TRAINING += ("frequency_test", "frequency_save")
CHOOSING = ("ratio", "selection", "p", "scope", "budget", "eps", "frg_steps", "alpha", "frg_samples", "dtype")

History = list[tuple[Epoch | None, Metrics | None]]  # an epoch that was not tested has no metrics


@dataclass(frozen=True)
class FineTuning:
    """Trains a pruned model, epoch by epoch; a killed and repeated run goes on after its last whole epoch.

    Args:
        model: takes pixels in [0,1]; trained in place. ``layers`` are its convolutions.
        images: uint8 ``[M, C, H, W]``, the clean subset, on the model's device; ``labels`` int64 ``[M]``.
        folder: for the state of an unfinished run, and what ``--frequency_save`` asks for.
        test: tests the model as it is; called with words for the log.
        save: writes the model to a file.
    """

    model: nn.Module
    layers: list[ConvLayer]
    images: Tensor
    labels: Tensor
    settings: Settings
    compute: Device
    facts: DatasetFacts
    folder: Path
    test: Callable[[str], Metrics]
    save: Callable[[Path], None]

    def run(
        self, masked: Choice | None, twins: Callable[[int], Tensor] | None = None, teacher: Teacher | None = None
    ) -> History:
        """What each epoch came to; the last one is always tested.

        Args:
            masked: maps that stay pruned.
            twins: see :func:`~fmp_core.models.training.train`.
        """
        logger, settings, state = logging.getLogger("fmp_core"), self.settings, self._state()
        history: History = []
        if state.load() is not None:
            history = [(Epoch(**epoch), tested and Metrics(**tested)) for epoch, tested in state.notes["history"]]
            logger.info("fine-tuning goes on after epoch %d of %d (--fresh starts again)", len(history), settings.epochs)
        resumed = len(history)

        def after_epoch(epoch: Epoch) -> None:
            number = epoch.epoch + 1
            if not math.isfinite(epoch.train_epoch_loss_avg_over_batch):
                logger.warning("the loss of epoch %d is not a number; try a smaller --lr", number)
            last = number == settings.epochs
            due = last or (settings.frequency_test and number % settings.frequency_test == 0)
            history.append((epoch, self.test(f"epoch {number} of {settings.epochs}") if due else None))
            if settings.frequency_save and number % settings.frequency_save == 0:
                self.save(self.folder / f"fmp_epoch_{epoch.epoch}.pt")
            state.notes["history"] = [(asdict(done), tested and asdict(tested)) for done, tested in history if done]

        def after_batch() -> None:
            if masked is not None:
                prune_feature_maps(self.layers, masked.by_layer(self.layers))
            bar.add()

        batches = -(-len(self.images) // settings.batch_size) * (settings.epochs - resumed)
        with Progress("Fine-tuning", batches, "batches", logger) as bar:
            train(
                self.model,
                self.images,
                self.labels,
                settings,
                self.compute,
                facts=self.facts,
                twins=twins,
                teacher=teacher.loss if teacher else None,
                after_epoch=after_epoch,
                after_batch=after_batch,
                checkpoint=state,
            )
        if resumed == settings.epochs:  # the numbers are known, the single predictions are not
            self.test("after fine-tuning")
        return history

    def forget(self) -> None:
        """Remove the state of an unfinished run; for when all results are written."""
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / "interrupted.pt"

    def _state(self) -> Checkpoint:
        """The state of fine-tuning after its last whole epoch."""
        made_with = {name: str(getattr(self.settings, name)) for name in (*TRAINING, *CHOOSING)}
        pruned = content_key(self.model.state_dict(), self.images, self.labels, {"by": str(self.compute)})
        checkpoint = Checkpoint(self._path, {**made_with, "digest of model, images and versions": pruned[:16]})
        if self.settings.fresh:
            checkpoint.remove()
        return checkpoint
