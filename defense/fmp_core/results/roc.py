"""How well detectors tell backdoored models from clean ones: false alarms, misses, and the ROC curve."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve

from fmp_core.errors import UserError
from fmp_core.results.collect import BASELINE
from fmp_core.results.figure import save
from fmp_core.results.plot_style import PLAIN

LEAST_ASR = 0.5  # of a model that counts as backdoored; a poisoned one below it is left out


def detections(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``frame`` (:func:`~fmp_core.results.collect.collect`) with a detector, and ``backdoored``: the truth.

    A model that was trained without poison is clean; one whose ASR is at least :data:`LEAST_ASR` is backdoored. Left out are
    other models, and those that only some of the detectors looked at. Of several runs of a detector on a model that with the
    lowest seed counts, then that with the most clean data.
    """
    asr = frame[frame["defense"] == BASELINE].set_index("record")["test_asr"]
    found = frame[frame["detector"].notna()].copy()
    clean, planted = found["pratio"] == 0, found["record"].map(asr) >= LEAST_ASR
    found["backdoored"] = planted & ~clean
    found = found[clean | planted].sort_values(["seed", "ratio"], ascending=[True, False], kind="stable")
    found = found.drop_duplicates(["record", "detector"]).sort_index()
    return found[found.groupby("record")["detector"].transform("nunique") == found["detector"].nunique()]


def detection_table(found: pd.DataFrame) -> str:
    """A line per detector: counts of models, false alarms, misses and wrong targets, and the area under the ROC curve (AUC)."""
    rates = pd.DataFrame([_rates(str(name), rows) for name, rows in found.groupby("detector", sort=False)])
    return rates.to_string(index=False, float_format="{:.2f}".format) + "\n"


def _rates(name: str, rows: pd.DataFrame) -> dict[str, object]:
    clean, attacked = rows[~rows["backdoored"]], rows[rows["backdoored"]]
    flagged = attacked[attacked["flagged"]]
    right = [target in str(named).split() for target, named in zip(flagged["target"], flagged["named"], strict=True)]
    return {
        "detector": name,
        "clean": len(clean),
        "false alarms": int(clean["flagged"].sum()),
        "backdoored": len(attacked),
        "missed": len(attacked) - len(flagged),
        "target not named": right.count(False),
        "AUC": area(rows),
    }


def area(rows: pd.DataFrame) -> float:
    """The area under the ROC curve; NaN where all models are clean or all backdoored."""
    both = rows["backdoored"].nunique() == 2
    return float(roc_auc_score(rows["backdoored"].astype(bool), rows["detection_score"])) if both else float("nan")


@PLAIN
def write_roc(path: Path, found: pd.DataFrame) -> None:
    """A curve per detector, with its own threshold as a dot, in the format that the suffix of ``path`` names.

    Raises UserError: no detector has both clean and backdoored models.
    """
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="false alarms, share of clean models", ylabel="found, share of backdoored models")
    for number, (name, rows) in enumerate(found.groupby("detector", sort=False)):
        if rows["backdoored"].nunique() == 2:
            alarms, found_rate, _ = roc_curve(rows["backdoored"].astype(bool), rows["detection_score"])
            width = 4 / (1 + number)  # equal curves lie on each other
            axes.plot(alarms, found_rate, color=f"C{number}", linewidth=width, label=f"{name}: AUC {area(rows):.2f}")
            own = rows.groupby("backdoored")["flagged"].mean()
            axes.plot(own[False], own[True], "o", color=f"C{number}", clip_on=False)
    if not axes.lines:
        raise UserError("--roc needs a detector's results on both clean models (--pratio 0) and backdoored ones.")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(color="0.93")
    axes.legend(loc="lower right", frameon=False)
    save(figure, path)
