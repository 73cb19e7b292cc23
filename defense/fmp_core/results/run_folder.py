"""The result folder of a run, ``record/<name>/defense/fmp/``: where each file lies, and how it is written."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fmp_core.data.names import DEFENSE_FILE
from fmp_core.data.write_record import write_defense_result
from fmp_core.errors import UserError
from fmp_core.inputs import Inputs
from fmp_core.inversion.trigger import INVERTED_TRIGGER, save_trigger
from fmp_core.metrics import HEADLINES, METRICS, MetricValues, ratings
from fmp_core.models.build import state_like
from fmp_core.models.evaluate import Evaluation, Metrics
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.models.training import Epoch
from fmp_core.results.bb_tables import history_frame, summary_frame, summary_writer, write_csv, write_events, write_plots
from fmp_core.results.predictions import prediction_frame
from fmp_core.results.read import read_attack_metrics
from fmp_core.results.removal import attack_outcome
from fmp_core.results.summary import RunSummary
from fmp_core.selection.choice import Selection
from fmp_core.settings import Settings
from fmp_core.storage.files import check_folders, hidden, make_folders, refuse_links_out_of, write_text
from fmp_core.system.cli import Stages
from fmp_core.system.devices import Device
from fmp_core.system.versions import versions

LOGGER = logging.getLogger("fmp_core")
FIGURES_DIFFER = 0.02  # of a fraction; evaluation batches, device and precision explain less
EPOCH_FILE = "fmp_epoch_{}.pt"  # by the 0-based epoch
History = Sequence[tuple[Epoch | None, Metrics | None]]  # an untested epoch has no metrics; None: no epoch was trained


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes. ``shared`` holds the cache of scores, which serves all runs on the record."""

    settings: Settings
    path: Path
    log: Path
    checkpoints: Path
    shared: Path

    @staticmethod
    def of(settings: Settings, record: Path) -> RunFolder:
        """In the folder of the record, or below ``--save_folder``, ``--checkpoint_save`` as that lies below ``--record_root``.

        Raises UserError: a link in the record leads out of it.
        """
        root = Path(settings.record_root)
        name = record.relative_to(root) if record.is_relative_to(root) else Path(record.name)
        if ".." in name.parts or not name.name:
            name = Path(record.name)
        home = Path(settings.save_folder) / name if settings.save_folder else record
        path, shared = home / "defense" / settings.defense_name, home / "defense" / "fmp"
        log, checkpoints = settings.log or path / "log", path / "checkpoint"
        if settings.checkpoint_save:  # several runs may be given one
            checkpoints = Path(settings.checkpoint_save) / name / settings.defense_name
        refuse_links_out_of(home, *(path / name for name in ("log", "checkpoint", "tensorboard")), shared / "cache")
        return RunFolder(settings, path, Path(log), checkpoints, shared)

    def check(self) -> None:
        """Raises UserError now rather than after an hour: a folder cannot be made, or TensorBoard is not installed."""
        another = "choose another --save_folder" if self.settings.save_folder else "let results go elsewhere with --save_folder"
        check_folders(self.path, remedy=another)
        for flag, folder in (("log", self.log), ("checkpoint_save", self.checkpoints)):
            check_folders(folder, remedy=f"choose another --{flag}" if getattr(self.settings, flag) else another)
        if self.settings.tensorboard:
            summary_writer()

    def make(self, subset: Sequence[int]) -> None:
        """Make the folders; the clean subset goes where BB's ft keeps it."""
        make_folders(self.log, self.checkpoints)
        write_text(self.log / "index.txt", _index_text(subset))

    def save_epoch(self, epoch: int, inputs: Inputs) -> None:
        """The model after the 0-based ``epoch``, as ``--frequency_save`` asks for."""
        write_defense_result(self.checkpoints / EPOCH_FILE.format(epoch), *_weights(inputs))

    def saved_epochs(self) -> list[Path]:
        """The models that ``--frequency_save`` left, of this run or an earlier one."""
        return sorted(self.checkpoints.glob(EPOCH_FILE.format("*")))

    def remove_epochs(self) -> None:
        """Remove :meth:`saved_epochs`."""
        for file in self.saved_epochs():
            file.unlink()

    def write(
        self,
        inputs: Inputs,
        selection: Selection,
        history: History,
        evaluations: Sequence[Evaluation],
        device: Device,
        stages: Stages,
    ) -> RunSummary:
        """All results of a run; metrics.json, which says that the others are there, comes last of those the report reads.

        ``evaluations``: the first is of the attacked model, the last of the repaired one.
        """
        first, last = evaluations[0], evaluations[-1]
        predictions = prediction_frame(inputs.test, first.predictions, last.predictions)
        before, after = first.metrics.headline(), last.metrics.headline()
        attack_figures, warnings = _compare_with_attack(inputs.record.folder, before, inputs.sample)
        diverged = not math.isfinite(last.metrics.clean_test_loss_avg_over_batch)
        if diverged:
            warnings.append("Fine-tuning diverged. The repaired model's outputs are not numbers; try a smaller --lr.")
        for warning in warnings:
            LOGGER.warning("%s", warning)
        with hidden(self.path / "metrics.json"):  # of an earlier run: a mixture of two would be read as one
            self._write_tables_and_model(inputs, selection, history, predictions)
            (self.path / "report.html").unlink(missing_ok=True)  # of an earlier run
            summary = RunSummary(
                before=before,
                after=after,
                der=ratings(before, after)["der"],
                record=inputs.record.folder.name,
                dataset=inputs.record.dataset,
                model=inputs.record.model_name,
                clean_images=len(inputs.subset),
                frg_images=selection.scores.samples if selection.scores else 0,
                feature_maps=len(selection.mask),
                pruned=selection.pruned,
                tied_at_cut=selection.ties,
                verdict=selection.verdict.as_dict() if selection.verdict else None,
                chosen_by=selection.selected_by,
                seconds=stages.seconds,
                reused=stages.reused,
                cpu_seconds=stages.cpu_seconds(),
                seed=self.settings.random_seed,
                device=device.full_name,
                settings=dataclasses.asdict(self.settings),
                versions=versions(),
                removal=attack_outcome(predictions, diverged),
                test_images=inputs.sample,
                attack_result=inputs.record.digest,
                attack_figures=attack_figures,
                warnings=warnings,
            )
            summary.write(self.path / "metrics.json")
        return summary

    def _write_tables_and_model(
        self, inputs: Inputs, selection: Selection, history: History, predictions: pd.DataFrame
    ) -> None:
        write_defense_result(self.path / DEFENSE_FILE, *_weights(inputs))  # first: what a full disk most likely has no room for
        epochs, maps = history_frame(history), feature_map_frame(inputs.defender.layers, selection, self.settings.scope)
        write_csv(self.path / "fmp_df.csv", epochs)
        write_csv(self.path / "fmp_df_summary.csv", summary_frame(epochs))
        write_plots(self.path, epochs)
        if self.settings.tensorboard:
            write_events(self.path / "tensorboard" / time.strftime("%Y_%m_%d_%H_%M_%S"), epochs)
        write_csv(self.path / "feature_maps.csv", maps, index=False)
        write_csv(self.path / "predictions.csv", predictions, index=False)
        write_text(self.path / "index.txt", _index_text(inputs.subset))  # where BB's fp keeps it
        if selection.triggers:
            save_trigger(self.path / INVERTED_TRIGGER, selection.triggers[0])
        else:
            (self.path / INVERTED_TRIGGER).unlink(missing_ok=True)  # of an earlier run


def _compare_with_attack(folder: Path, before: MetricValues, sample: int | None) -> tuple[dict[str, float] | None, list[str]]:
    """The attack's own figures of the attacked model, if the record has them, and a warning where ours differ much."""
    allowed = FIGURES_DIFFER + (1.5 / sample**0.5 if sample else 0)  # a sample may explain three standard deviations
    try:
        figures = read_attack_metrics(folder)
    except UserError as problem:
        return None, [str(problem)]
    differing = [
        f"{HEADLINES[name]} {100 * here:.1f} % here, {100 * figures[name]:.1f} % there"
        for name in METRICS
        if figures and (here := before[name]) is not None and abs(here - figures[name]) > allowed
    ]
    warning = (
        f"The attack reported other figures of this model in {folder / 'attack_df_summary.csv'}: {'; '.join(differing)}. "
        "Perhaps its preprocessing is another one (--mean, --std) or the dataset is not the one it was trained on."
    )
    return figures or None, [warning] if differing else []


def _weights(inputs: Inputs) -> tuple[str, int, dict[str, Tensor]]:
    """The model as it is, in the record's names, key order and dtypes."""
    record = inputs.record
    return record.model_name, record.num_classes, state_like(inputs.defender.model.network, record.state)


def feature_map_frame(layers: Sequence[ConvLayer], selection: Selection, scope: str) -> pd.DataFrame:
    """One row per feature map; ``rank`` 1 is the lowest score of those ``scope`` compares.

    Maps that racing dropped have no margin. Without scores there is no rank. ``moved`` is how far an inverted trigger changes
    the map's activation, if that selected.
    """
    maps = [(layer.name, channel) for layer in layers for channel in range(layer.channels)]
    frame = pd.DataFrame(maps, columns=["layer", "channel"])
    scores = selection.scores
    if scores is not None:
        margin = scores.margin if scores.settled is None else scores.margin.where(scores.settled, torch.nan)
        frame = frame.assign(correct=scores.correct.numpy(), samples=scores.samples, margin=margin.numpy())
        frame.loc[scores.order().numpy(), "rank"] = np.arange(1, scores.total + 1)
        ranks = frame.groupby("layer", sort=False)["rank"].rank(method="first") if scope == "layer" else frame["rank"]
        frame["rank"] = ranks.astype(np.int64)
    if selection.activation_change is not None:
        frame["moved"] = selection.activation_change.numpy()
    return frame.assign(pruned=selection.mask.numpy())


def _index_text(subset: Sequence[int]) -> str:
    return "".join(f"{position}\n" for position in subset)
