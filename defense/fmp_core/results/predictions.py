"""What a model says about every test image, before and after the defense, as a small table on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fmp_core.errors import UserError
from fmp_core.models.evaluate import Predictions, TestData
from fmp_core.results.bb_tables import read_table
from fmp_core.system.devices import to_host

COLUMNS = ["poisoned", "label", "target", "before", "after"]


def prediction_frame(data: TestData, before: Predictions, after: Predictions) -> pd.DataFrame:
    """One row per test image, the clean ones first, then the poisoned.

    ``label`` is what the image shows, ``target`` what the attacker wants (-1 for clean images); ``before`` and ``after`` are
    the classes the model names.
    """
    clean = {"label": data.clean_labels, "before": before.clean, "after": after.clean}
    poisoned = {"label": data.originals, "target": data.targets, "before": before.poisoned, "after": after.poisoned}
    parts = []
    for tensors in (clean, poisoned):
        rows = {name: column.numpy() for name, column in zip(tensors, to_host(tensors.values()), strict=True)}
        parts.append(pd.DataFrame({"poisoned": tensors is poisoned, "target": -1, **rows}))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def read_predictions(path: Path, num_classes: int) -> pd.DataFrame:
    """The table at ``path``. Raises UserError: the file is missing or damaged."""
    frame = read_table(path, COLUMNS)
    poisoned, classes = frame["poisoned"], frame[COLUMNS[1:]].to_numpy()
    if poisoned.dtype != bool or poisoned.all():
        raise UserError(f"{path} must say which images are poisoned (True) and which clean; run the defense again.")
    if not np.issubdtype(classes.dtype, np.integer) or (classes < [0, -1, 0, 0]).any() or classes.max() >= num_classes:
        raise UserError(f"{path} names classes outside 0..{num_classes - 1}; run the defense again.")
    return frame


def confusion(frame: pd.DataFrame, when: str, poisoned: bool, num_classes: int) -> np.ndarray:
    """Counts, int64 ``[num_classes, num_classes]``: rows are what images show, columns what the model says ``when``."""
    rows = frame[frame["poisoned"] == poisoned]
    cells = rows["label"].to_numpy() * num_classes + rows[when].to_numpy()
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def success_by_class(frame: pd.DataFrame) -> pd.DataFrame:
    """Attack success per true class: index ``label``; columns ``before``, ``after`` (shares), ``images``."""
    rows = frame[frame["poisoned"]]
    hits = rows[["before", "after"]].eq(rows["target"], axis=0).groupby(rows["label"])
    return hits.mean().assign(images=hits.size())
