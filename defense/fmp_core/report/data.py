"""What a report is made from: the files a run left, and what the trigger does to the attacked model's feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fmp_core.data.attack_record import AttackRecord
from fmp_core.errors import UserError
from fmp_core.frg.scores import Scores, layer_slices
from fmp_core.inputs import paired_images, preprocessing
from fmp_core.metrics import METRICS
from fmp_core.models.activation_change import Precision, precision_at, trigger_activation_change
from fmp_core.models.build import PixelModel, load_model
from fmp_core.models.evaluate import TestData, to_unit
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.results.bb_tables import read_table
from fmp_core.results.intervals import Interval, paired_difference, rating, share_of
from fmp_core.results.predictions import read_predictions
from fmp_core.results.summary import RunSummary
from fmp_core.results.values import is_of_type
from fmp_core.settings import Settings

SETTINGS = ("p", "scope", "eps", "frg_steps", "alpha", "selection", "budget", "preset")  # without these there is no page


@dataclass(frozen=True)
class Run:
    """One run's result folder: ``summary`` is ``metrics.json``, ``maps`` ``feature_maps.csv``, ``history`` ``fmp_df.csv``,
    ``predictions`` ``predictions.csv``; ``layers`` are those of the attacked model, which ``maps`` is about."""

    folder: Path
    summary: RunSummary
    maps: pd.DataFrame
    history: pd.DataFrame
    predictions: pd.DataFrame
    layers: list[ConvLayer]

    @property
    def p(self) -> int:
        return int(self.summary.settings["p"])

    @property
    def scope(self) -> str:
        return str(self.summary.settings["scope"])

    @property
    def scored(self) -> bool:
        """Whether feature maps were scored by FRG; the ablations (--selection random, none) and inverted triggers need none."""
        return "rank" in self.maps

    @property
    def by_trigger(self) -> bool:
        """Whether maps were selected by how far an inverted trigger changes their activation (``--selection trigger``).

        Some ablations measure that change and then prune others.
        """
        return "moved" in self.maps and not self.summary.chosen_by

    def of_maps(self, column: str) -> Tensor:
        """A column of ``maps``, ``[N_maps]``."""
        return torch.from_numpy(self.maps[column].to_numpy(copy=True))

    @cached_property
    def scores(self) -> Scores:
        """FRG's scores as ``feature_maps.csv`` keeps them. Only of a run that has them; smallest margins are not kept."""
        margin = self.of_maps("margin").double()
        settled = None if margin.isfinite().all() else margin.isfinite()  # maps that racing dropped have no margin
        unknown, samples = torch.full_like(margin, torch.nan), int(self.maps["samples"].max())
        return Scores(tuple(self.layers), self.of_maps("correct"), margin, unknown, samples, settled)

    def hits(self, metric: str, when: str) -> np.ndarray:
        """Which test images count for ``metric`` (Acc: of the clean, ASR and RA: of the triggered), bool ``[N]``."""
        rows = self.predictions[self.predictions["poisoned"] != (metric == "test_acc")]
        return (rows[when] == rows["target" if metric == "test_asr" else "label"]).to_numpy()

    @property
    def tested(self) -> tuple[str, ...]:
        """The METRICS that are known: Acc alone where there was no triggered image."""
        return METRICS if self.predictions["poisoned"].any() else METRICS[:1]

    def shares(self, when: str) -> dict[str, Interval]:
        """The figures ``tested``, ``before`` or ``after`` the defense, with Wilson limits."""
        return {name: share_of(self.hits(name, when)) for name in self.tested}

    def changes(self) -> dict[str, Interval]:
        """The figures ``tested`` after minus before, with limits for paired figures: both are of the same images."""
        return {name: paired_difference(self.hits(name, "after"), self.hits(name, "before")) for name in self.tested}

    def effectiveness(self) -> Interval | None:
        """The defense effectiveness rating (DER), which needs triggered images."""
        if self.tested != METRICS:
            return None
        drops = (paired_difference(self.hits(name, "before"), self.hits(name, "after")) for name in ("test_asr", "test_acc"))
        return rating(*drops)


@dataclass(frozen=True)
class Trigger:
    """What the trigger does to the attacked ``model``, which takes pixels in [0,1]; ``layers`` are its convolutions.

    ``clean`` and ``poisoned``: uint8 ``[n, C, H, W]``, row by row the same image; ``labels`` int64 ``[n]``, what it shows;
    ``tac`` float64 ``[N_maps]``, the trigger activation change of each feature map over these pairs.
    """

    model: PixelModel
    layers: list[ConvLayer]
    clean: Tensor
    poisoned: Tensor
    labels: Tensor
    tac: Tensor

    def precision(self, selected: Tensor) -> Precision:
        """How many of the maps ``selected``, bool ``[N_maps]``, are among those whose activation the trigger changes most."""
        return precision_at(selected, self.tac, self.layers)

    def ranks(self) -> Tensor:
        """Place of each map in its layer, int64 ``[N_maps]``; 1 is the largest activation change."""
        parts = (self.tac[positions] for _, positions in layer_slices(self.layers))
        return torch.cat([part.argsort(descending=True, stable=True).argsort() + 1 for part in parts])


def load_attacked(record: AttackRecord, settings: dict[str, Any], device: torch.device) -> tuple[PixelModel, list[ConvLayer]]:
    """The record's model on ``device``, with the preprocessing of a run with these ``settings``, and its convolutions."""
    facts = preprocessing(record, settings.get("mean"), settings.get("std"))
    network = load_model(record.model_name, record.num_classes, record.state)
    model = PixelModel(network, facts).on(device)
    height, width, channels = record.image_size
    return model, trace_conv_layers(network, torch.zeros(1, channels, height, width, device=device))


def measure_trigger(model: PixelModel, layers: list[ConvLayer], data: TestData) -> Trigger:
    """The trigger activation change of all feature maps. Raises UserError: no poisoned image has a known clean counterpart."""
    clean, poisoned, labels = paired_images(data)
    tac = trigger_activation_change(model, layers, to_unit(clean), to_unit(poisoned))
    return Trigger(model, layers, clean, poisoned, labels, tac)


def read_summary(folder: Path) -> RunSummary:
    """``metrics.json`` of a run. Raises UserError: it is missing, damaged, or lacks what the page names."""
    path = folder / "metrics.json"
    summary = RunSummary.read(path)
    kinds = get_type_hints(Settings)
    wrong = [name for name in (*SETTINGS, "mean", "std") if not is_of_type(summary.settings.get(name), kinds[name])]
    if wrong:
        raise UserError(f"{path} does not say with which {', '.join(wrong)} the run was made; run the defense again.")
    return summary


def read_run(folder: Path, summary: RunSummary, num_classes: int, layers: list[ConvLayer]) -> Run:
    """Read the tables of a result folder. Raises UserError: a file is missing, damaged, of another run or another model."""
    exact = {"margin": lambda text: float(text or "nan")}  # pandas may round the last digit, which can decide a tie
    maps = read_table(folder / "feature_maps.csv", ["layer", "channel", "pruned"], converters=exact)
    if "rank" in maps:  # FRG scored them, so there must be more columns
        maps = read_table(folder / "feature_maps.csv", ["correct", "samples", "margin"], converters=exact)
    history = read_table(folder / "fmp_df.csv", ["epoch", "train_acc"], index_col=0)
    expected = [(layer.name, channel) for layer in layers for channel in range(layer.channels)]
    if list(zip(maps["layer"], maps["channel"], strict=True)) != expected:
        raise UserError(f"{folder / 'feature_maps.csv'} is not about the record's model; run the defense again.")
    run = Run(folder, summary, maps, history, read_predictions(folder / "predictions.csv", num_classes), layers)
    for when, figures in (("before", summary.before), ("after", summary.after)):
        shares = run.shares(when)
        told = {name: figure for name in METRICS if (figure := figures[name]) is not None}
        if told.keys() != shares.keys() or any(abs(told[name] - shares[name].value) > 1e-6 for name in told):
            raise UserError(f"{folder / 'predictions.csv'} and metrics.json are of different runs; run the defense again.")
    if run.by_trigger and not summary.verdict:
        raise UserError(f"{folder / 'feature_maps.csv'} and metrics.json are of different runs; run the defense again.")
    return run
