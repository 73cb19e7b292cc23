"""Finished runs made up for tests of the report: the tables and the summary that a result folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fmp_core.inversion.verdict import Verdict
from fmp_core.metrics import METRICS
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.report.data import Run
from fmp_core.results.summary import RunSummary
from fmp_core.settings import Settings
from torch import nn

HISTORY = ["epoch", "train_acc", "train_epoch_loss_avg_over_batch", *METRICS, "clean_test_loss_avg_over_batch"]
HISTORY += ["bd_test_loss_avg_over_batch"]
VERDICT = Verdict("sparse", torch.tensor([0.1, 0.2, 0.0, 0.9, 0.1], dtype=torch.float64), held_out=60).as_dict()  # target 3


def scored_maps(counts: dict[str, list[int]], samples: int = 32, margins: bool = False) -> pd.DataFrame:
    """``feature_maps.csv`` of layers whose maps leave so many images correct (``pruned`` is to be added)."""
    frames = []
    for name, correct in counts.items():
        frame = pd.DataFrame({"layer": name, "channel": range(len(correct)), "correct": correct, "samples": samples})
        margin = np.random.default_rng(len(frames)).normal(size=len(correct)) if margins else 0.0
        frames.append(frame.assign(margin=margin, rank=1, pruned=False))
    return pd.concat(frames, ignore_index=True)


def predictions(after: tuple[float, float], before: tuple[float, float] = (0.9, 0.95), images: int = 10000) -> pd.DataFrame:
    """``predictions.csv``: ``(Acc, ASR)`` on so many clean images of class 1, and as many triggered ones towards class 0.

    Clean images that are not classified correctly are called class 2.
    """

    def classes(metric: int, hit: int, miss: int) -> dict[str, np.ndarray]:
        shares = {"before": before[metric], "after": after[metric]}
        return {when: np.where(np.arange(images) < round(share * images), hit, miss) for when, share in shares.items()}

    clean, triggered = classes(0, 1, 2), classes(1, 0, 1)
    frames = [
        pd.DataFrame({"poisoned": False, "label": 1, "target": -1, **clean}),
        pd.DataFrame({"poisoned": True, "label": 1, "target": 0, **triggered}),
    ]
    return pd.concat(frames, ignore_index=True)


def made_run(maps: pd.DataFrame, rows: pd.DataFrame | None = None, settings: dict[str, Any] | None = None, **more: Any) -> Run:
    """A run with these tables; ``settings`` over the defaults, ``more`` over the other keys of its summary."""
    rows = predictions((0.9, 0.02)) if rows is None else rows
    shares = dict.fromkeys(METRICS, 0.5)
    summary = RunSummary(
        before=shares,
        after=shares,
        der=0.5,
        record="badnet_x",
        dataset="cifar10",
        model="preactresnet18",
        clean_images=5000,
        frg_images=32,
        feature_maps=len(maps),
        pruned=int(maps["pruned"].sum()),
        tied_at_cut=0,
        verdict=None,
        chosen_by=None,
        seconds={"ranking": 90.0, "testing": 3.0},
        seed=0,
        device="cpu",
        settings=dataclasses.asdict(Settings()) | (settings or {}),
        versions={"torch": "2"},
    )
    history = pd.DataFrame({"epoch": [0, 1], "train_acc": [0.5, 0.6], "train_epoch_loss_avg_over_batch": [1.0, 0.9]})
    layers = [ConvLayer(str(name), nn.Conv2d(1, len(group), 1)) for name, group in maps.groupby("layer", sort=False)]
    folder = Path("record") / "badnet_x" / "defense" / "fmp"
    return Run(folder, dataclasses.replace(summary, **more), maps, history.reindex(columns=HISTORY), rows, layers)
