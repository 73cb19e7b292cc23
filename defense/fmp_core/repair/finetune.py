"""FMP's fine-tuning (paper, Algorithm 1, line 14): the pruned model is trained on the clean subset again."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from fmp_core import inversion, models, repair, selection
from fmp_core.data import clean_subset
from fmp_core.inputs import DefenderInputs
from fmp_core.models.evaluate import Metrics
from fmp_core.models.pruning import parts_of, set_to_zero
from fmp_core.models.training import Epoch, Trainer, training_precision
from fmp_core.repair.distillation import Teacher
from fmp_core.repair.interpolation import Interpolation
from fmp_core.repair.unlearning import Unlearning
from fmp_core.selection.choice import Selection
from fmp_core.selection.select import trigger_search
from fmp_core.settings import Settings, deciding_result
from fmp_core.storage.checkpoint import Checkpoint, content_key
from fmp_core.system import devices
from fmp_core.system.devices import Device, choose_dtype
from fmp_core.system.progress import Progress
from fmp_core.system.versions import source_digest

LOGGER = logging.getLogger("fmp_core")
REPAIR_CODE = source_digest(repair, inversion, models, selection, clean_subset, devices)


@dataclass
class TrainedEpoch:
    """One epoch of fine-tuning. The caller tests the model where ``to_test``, and sets ``metrics``.

    ``to_save``: the model is wanted as a file after this epoch. ``restored``: an earlier, interrupted run trained it.
    """

    epoch: Epoch
    to_test: bool
    to_save: bool
    metrics: Metrics | None = None
    restored: bool = False

    @property
    def number(self) -> int:
        """1 for the first epoch."""
        return self.epoch.epoch + 1


@dataclass(frozen=True)
class FineTuning:
    """Trains a pruned model epoch by epoch; a killed and repeated run continues after its last whole epoch.

    Make it with :meth:`prepare`, before pruning: distillation and interpolation keep copies of the attacked model.

    Args:
        defender: the model, trained in place, and the clean images.
        selection: what is pruned.
        device: with several GPUs, batches are split over them.
        folder: for the state of an unfinished run.
        teacher, unlearning, interpolation: None where the settings leave them out.
    """

    defender: DefenderInputs
    selection: Selection
    settings: Settings
    device: Device
    folder: Path
    teacher: Teacher | None
    unlearning: Unlearning | None
    interpolation: Interpolation | None

    @staticmethod
    def prepare(defender: DefenderInputs, selection: Selection, settings: Settings, device: Device, folder: Path) -> FineTuning:
        """With the teacher, the unlearning and the interpolation that ``settings`` ask for."""
        teacher = unlearning = interpolation = None
        if settings.unlearn and selection.triggers:
            unlearning = Unlearning(trigger_search(defender, settings), selection.triggers)
        # Where no target is named, the attacked model's outputs and weights keep the backdoor.
        if settings.epochs and (selection.triggers or settings.selection != "trigger"):
            if settings.distill:
                teacher = Teacher.copy_of(defender.model, settings.distill, selection.target)
            if settings.interpolate:
                interpolation = Interpolation.towards(defender.model, settings.interpolate)
        return FineTuning(defender, selection, settings, device, folder, teacher, unlearning, interpolation)

    def run(self) -> Iterator[TrainedEpoch]:
        """Train; epochs of an interrupted run come first, with their metrics. The last epoch's model is interpolated."""
        settings, checkpoint = self.settings, self._checkpoint()
        done: list[TrainedEpoch] = []
        if checkpoint.load() is not None:
            for epoch, metrics in checkpoint.notes["history"]:
                planned = self._plan(Epoch(**epoch), metrics and Metrics(**metrics))
                # It was saved then; the model is that of the last epoch now, or of none yet.
                done.append(replace(planned, restored=True, to_save=False))
            LOGGER.info("fine-tuning continues after epoch %d of %d (--fresh starts again)", len(done), settings.epochs)
        yield from done
        batches = -(-len(self.defender.images) // settings.batch_size) * (settings.epochs - len(done))
        trainer = Trainer(settings, self.device, self.defender.facts, checkpoint)
        pruned = parts_of(self.defender.layers, self.selection.by_layer(self.defender.layers)) if settings.masked else []
        with Progress("Fine-tuning", batches, "batches", LOGGER) as bar:

            def on_batch(*_: object) -> None:
                set_to_zero(pruned)
                bar.add()

            for epoch in trainer.epochs(
                self.defender.model,
                self.defender.images,
                self.defender.labels,
                on_batch=on_batch,
                substitutes=self.unlearning.substitutes if self.unlearning else None,
                teacher=self.teacher.loss if self.teacher else None,
            ):
                if self.interpolation and epoch.epoch + 1 == settings.epochs:
                    self.interpolation.apply(self.defender.model)
                    on_batch()
                state = self.defender.model.state_dict().values()
                if not (math.isfinite(epoch.train_epoch_loss_avg_over_batch) and all(x.isfinite().all() for x in state)):
                    LOGGER.warning("the loss or the weights of epoch %d are not numbers; try a smaller --lr", epoch.epoch + 1)
                done.append(self._plan(epoch))
                yield done[-1]
                checkpoint.notes["history"] = [(asdict(e.epoch), e.metrics and asdict(e.metrics)) for e in done]

    def forget(self) -> None:
        """Remove the state of an unfinished run; for when all results are written."""
        if self.settings.epochs:  # without, the state of another, interrupted run may lie there
            self.state.unlink(missing_ok=True)

    def _plan(self, epoch: Epoch, metrics: Metrics | None = None) -> TrainedEpoch:
        number, test, save = epoch.epoch + 1, self.settings.frequency_test, self.settings.frequency_save
        last = number == self.settings.epochs
        to_test = last or bool(test and number % test == 0)
        return TrainedEpoch(epoch, to_test, bool(save and number % save == 0), metrics)

    @property
    def state(self) -> Path:
        """The file of an unfinished run."""
        return self.folder / "interrupted.pt"

    def _checkpoint(self) -> Checkpoint:
        """The state of fine-tuning after its last whole epoch."""
        defender = self.defender
        made_with = {name: str(getattr(self.settings, name)) for name in deciding_result()}
        pruned = content_key(
            defender.model.state_dict(),
            defender.images,
            defender.labels,
            {"GPUs": max(1, len(self.device.device_ids)), "code": REPAIR_CODE, "facts": str(defender.facts)},
        )
        triggers = self.selection.triggers
        inverted = f"{', '.join(trigger.family for trigger in triggers)} towards {triggers[0].target}" if triggers else "none"
        made_with |= {
            "precision of training": str(training_precision(self.settings, self.device.device)),
            "precision of trigger inversion": str(choose_dtype(self.settings.dtype, self.device.device)),
            "inverted triggers": inverted,
            "pruned feature maps (another processor or number of threads may select others)": _named(self.selection.mask),
            "digest of model, images, code and versions": pruned[:16],
        }
        checkpoint = Checkpoint(self.state, made_with)
        if self.settings.fresh:
            checkpoint.remove()
        return checkpoint


def _named(mask: Tensor) -> str:
    """How many maps are chosen, and a digest of which: ``75, 1a2b3c4d``."""
    return f"{int(mask.sum())}, {hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:8]}"
