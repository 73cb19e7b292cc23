"""What a report is made from: the files a run left, and what the trigger does to the attacked model's feature maps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fmp_core.data.attack_record import AttackRecord
from fmp_core.data.datasets import dataset_facts
from fmp_core.errors import UserError
from fmp_core.models.activation_change import Precision, precision_at, trigger_activation_change
from fmp_core.models.build import PixelModel, load_model
from fmp_core.models.evaluate import TestData, evaluate_and_keep, to_unit
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.report.intervals import Interval, wilson
from fmp_core.results.predictions import confusion, prediction_frame, read_predictions
from fmp_core.storage.files import replacing
from fmp_core.storage.torch_file import load_torch_file

TWINS = 256  # pairs of clean and poisoned images that TAC is averaged over
OTHER_P = (8, 16, 32, 64, 128)
# What the page names of metrics.json beside settings.
NEEDED = ("before", "after", "model", "dataset", "feature_maps", "pruned", "clean_images", "frg_images", "seed", "device")


@dataclass(frozen=True)
class Run:
    """One run's result folder. ``maps`` is ``feature_maps.csv``, ``history`` is ``fmp_df.csv``, ``metrics`` is
    ``metrics.json``, ``predictions`` is ``predictions.csv``."""

    folder: Path
    metrics: dict[str, Any]
    maps: pd.DataFrame
    history: pd.DataFrame
    predictions: pd.DataFrame

    def intervals(self, when: str, num_classes: int) -> dict[str, Interval]:
        """Acc, ASR and RA ``before`` or ``after`` with Wilson limits; counts come from the predictions."""
        rows = self.predictions
        poisoned = rows["poisoned"].astype(bool)
        clean_hits, images = np.trace(confusion(rows, when, False, num_classes)), int((~poisoned).sum())
        triggered = rows[poisoned]
        shares = {
            "test_acc": (int(clean_hits), images),
            "test_asr": (int((triggered[when] == triggered["target"]).sum()), len(triggered)),
            "test_ra": (int((triggered[when] == triggered["label"]).sum()), len(triggered)),
        }
        return {name: wilson(hits / total, total) for name, (hits, total) in shares.items()}

    @property
    def p(self) -> int:
        return int(self.metrics["settings"]["p"])

    @property
    def scored(self) -> bool:
        """Whether maps were scored by FRG; the ablations (--selection random, none) and inverted triggers need no scores."""
        return "rank" in self.maps

    @property
    def by_trigger(self) -> bool:
        """Whether maps were chosen by how far a inverted trigger moves them (``--selection trigger``)."""
        return "moved" in self.maps

    def cuts(self, p: int) -> dict[str, int]:
        """How many maps of each layer would be pruned at ``p``: ranks count within the layer, or over all (scope global)."""
        by_layer = self.maps.groupby("layer", sort=False)
        if self.metrics["settings"]["scope"] == "global":
            return {str(name): int((group["rank"] <= len(self.maps) // p).sum()) for name, group in by_layer}
        return {str(name): len(group) // p for name, group in by_layer}

    def chosen(self, p: int) -> Tensor:
        """The maps that would be pruned at ``p``, bool ``[N]``; what was pruned, at the run's own p."""
        if p == self.p:
            return torch.from_numpy(self.maps["pruned"].to_numpy(dtype=bool, copy=True))
        in_layer = self.maps.groupby("layer", sort=False)["rank"].rank(method="first")
        return torch.from_numpy((in_layer <= self.maps["layer"].map(self.cuts(p))).to_numpy(copy=True))

    def tied(self, p: int) -> np.ndarray:
        """Maps whose ``correct`` equals that of a cut at ``p`` which they straddle, bool ``[N]``."""
        found = np.zeros(len(self.maps), dtype=bool)
        if not self.scored:
            return found
        whole = self.metrics["settings"]["scope"] == "global"
        groups = [("", self.maps)] if whole else self.maps.groupby("layer", sort=False)
        for _, group in groups:
            correct = group.sort_values("rank")["correct"].to_numpy()
            count = len(group) // p
            if 0 < count < len(group) and correct[count - 1] == correct[count]:
                found[group.index[group["correct"] == correct[count]]] = True
        return found


@dataclass(frozen=True)
class Trigger:
    """What the trigger does to the attacked model. ``clean`` and ``poisoned``: uint8 ``[n, C, H, W]``, row by row the same
    image; ``tac`` float64 ``[N_maps]``."""

    model: PixelModel
    layers: list[ConvLayer]
    clean: Tensor
    poisoned: Tensor
    labels: Tensor
    tac: Tensor

    def precision(self, chosen: Tensor) -> Precision:
        return precision_at(chosen, self.tac, self.layers)


def read_run(folder: Path, record: AttackRecord, data: TestData, batch_size: int = 256) -> Run:
    """Read a result folder; predictions that are not there are made with the record's model and the defended one, and kept.

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    metrics = _read(folder / "metrics.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    maps = _read(folder / "feature_maps.csv", pd.read_csv)
    history = _read(folder / "fmp_df.csv", lambda path: pd.read_csv(path, index_col=0))
    try:
        _ = [metrics["settings"][name] for name in ("p", "scope", "eps", "frg_steps", "alpha")]
        _ = [metrics[name] for name in (*NEEDED, "seconds", "versions")]
        scores = ["correct", "samples", "margin", "rank"] if "rank" in maps else []
        _ = maps[["layer", "channel", *scores, "pruned"]], history["train_acc"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no results of fmp that a report can be made from: {error} is missing.") from None
    path = folder / "predictions.csv"
    predictions = read_predictions(path, data, record.num_classes)
    if predictions is None:
        predictions = predict_again(folder, record, data, batch_size)
        with replacing(path) as temporary:
            predictions.to_csv(temporary, index=False)
    return Run(folder, metrics, maps, history, predictions)


def predict_again(folder: Path, record: AttackRecord, data: TestData, batch_size: int) -> pd.DataFrame:
    """Both models on both test sets, as the run itself did it."""
    content = load_torch_file(folder / "defense_result.pt")
    try:
        state = {str(key): value for key, value in content["model"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / 'defense_result.pt'} holds no model; run the defense again.") from None
    states = (record.state, state)
    before, after = (evaluate_and_keep(attacked_model(record, s, data), data, batch_size)[1] for s in states)
    return prediction_frame(data, before, after)


def attacked_model(record: AttackRecord, state: Any, data: TestData) -> PixelModel:
    """The record's architecture with the weights ``state``, on the device of ``data``."""
    network = load_model(record.model_name, record.num_classes, state)
    model = PixelModel(network, dataset_facts(record.dataset, record.image_size))
    return model.to(data.clean_images.device).to(memory_format=torch.channels_last)


def watch_trigger(record: AttackRecord, data: TestData, maps: pd.DataFrame) -> Trigger | str:
    """TAC of the attacked model on an even sample of poisoned images, or one sentence saying why there is none."""
    try:
        clean, poisoned, labels = twins(record, data, TWINS)
    except UserError as error:
        return str(error)
    model = attacked_model(record, record.state, data)
    layers = trace_conv_layers(model.network, to_unit(clean[:1]))
    expected = [(layer.name, channel) for layer in layers for channel in range(layer.channels)]
    if list(zip(maps["layer"], maps["channel"], strict=True)) != expected:
        raise UserError("feature_maps.csv is not about the record's model; run the defense again.")
    tac = trigger_activation_change(model, layers, to_unit(clean), to_unit(poisoned))
    return Trigger(model, layers, clean, poisoned, labels, tac)


def twins(record: AttackRecord, data: TestData, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most ``count`` pairs, evenly over the poisoned test set: clean images, the poisoned ones made from them (uint8
    ``[n, C, H, W]``), and their true classes (int64 ``[n]``).

    Raises:
        UserError: it is not known which clean image belongs to a poisoned one.
    """
    indices = record.bd_test.indices
    if indices is None or int(indices.min()) < 0 or int(indices.max()) >= len(data.clean_labels):
        raise UserError("The record does not say which clean test image each poisoned one was made from.")
    indices = indices.to(data.clean_labels.device)
    if not bool((data.clean_labels[indices] == data.originals).all()):
        raise UserError(
            "The clean test set on disk is in another order than the attack's, so poisoned images have no clean twins."
        )
    rows = torch.linspace(0, len(indices) - 1, min(count, len(indices))).round().long().to(indices.device)
    return data.clean_images[indices[rows]], data.poisoned_images[rows], data.originals[rows]


def other_cuts(run: Run, trigger: Trigger | None) -> list[dict[str, Any]]:
    """One row per p worth comparing: maps pruned, tied at the cut, and the precision against TAC if that is known."""
    rows = []
    for p in sorted({*OTHER_P, run.p}) if run.scored else ():
        chosen = run.chosen(p)
        if chosen.any():
            found = trigger.precision(chosen) if trigger else None
            rows.append({"p": p, "maps": int(chosen.sum()), "tied": int(run.tied(p).sum()), "precision": found})
    return rows


def _read(path: Path, reader: Any) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the defense first, or check --result_file and --defense_name.")
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read ({detail}); run the defense again.") from None
