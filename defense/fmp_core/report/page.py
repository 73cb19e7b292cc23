"""``report.html``: one self-contained page about one run."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd

from fmp_core.data.attack_record import AttackRecord
from fmp_core.errors import UserError
from fmp_core.models.evaluate import TestData
from fmp_core.report import figures
from fmp_core.report.data import OTHER_P, Run, Trigger, other_cuts, read_run, watch_trigger
from fmp_core.report.findings import command, verdict, warnings
from fmp_core.report.intervals import Interval, defense_effectiveness, difference, wilson
from fmp_core.report.pictures import pictures
from fmp_core.results.predictions import confusion, success_by_class
from fmp_core.results.read import UnreadableError, read_result
from fmp_core.storage.files import write_text

PAGE = Path(__file__).parent / "assets"  # template, style and script
METRICS = {"test_acc": "Acc", "test_asr": "ASR", "test_ra": "RA"}
MEANS = {
    "test_acc": "clean images, right class",
    "test_asr": "triggered images, attacker's class",
    "test_ra": "triggered images, true class",
}
CURVES = {
    "train_acc": ("train Acc", figures.BEFORE),
    "test_acc": ("Acc", figures.INK),
    "test_ra": ("RA", figures.AFTER),
    "test_asr": ("ASR", figures.TRIGGER),
}
LOSSES = {
    "train_epoch_loss_avg_over_batch": ("train", figures.BEFORE),
    "clean_test_loss_avg_over_batch": ("clean test", figures.INK),
    "bd_test_loss_avg_over_batch": ("triggered test", figures.TRIGGER),
}


def write_report(record: AttackRecord, folder: Path, data: TestData, compare: Sequence[str] = ()) -> Path:
    """Write ``folder/report.html`` about the run whose files ``folder`` holds; returns its path.

    Poisoned test images are looked at here, and the run is over: nothing a model or a choice depends on is written.

    Args:
        record: the attack record.
        folder: the run's result folder (``metrics.json``, ``feature_maps.csv``, ``fmp_df.csv``, ``defense_result.pt``).
        data: both test sets.
        compare: names of other result folders beside ``folder`` whose Acc, ASR and RA stand in a table.

    Raises:
        UserError: a file is missing or damaged; nothing is written.
    """
    others = {name: _other(folder.parent / name) for name in compare}
    run = read_run(folder, record, data)
    path = folder / "report.html"
    write_text(path, page(run, record.num_classes, watch_trigger(record, data, run.maps), others))
    return path


def _other(folder: Path) -> Mapping[str, float]:
    if not folder.is_dir():
        raise UserError(f"--compare {folder.name}: {folder} does not exist; run that defense first.")
    try:
        return read_result(folder).metrics
    except UnreadableError as error:
        raise UserError(f"--compare {folder.name}: {error}; that defense may not have ended.") from None


def page(run: Run, classes: int, trigger: Trigger | str, others: Mapping[str, Mapping[str, float]]) -> str:
    """The page's HTML. ``trigger`` may be the sentence that says why nothing is known about it."""
    before, after = (run.intervals(when, classes) for when in ("before", "after"))
    known = trigger if isinstance(trigger, Trigger) else None
    cuts = other_cuts(run, known)
    precision = known.precision(run.chosen(run.p)) if known else None
    matrices = [
        {
            "title": f"{'Triggered' if poisoned else 'Clean'} images, {when}",
            "svg": figures.confusion_matrix(
                confusion(run.predictions, when, poisoned, classes),
                f"Confusion matrix of {'triggered' if poisoned else 'clean'} test images {when} the defense",
            ),
        }
        for poisoned in (False, True)
        for when in ("before", "after")
    ]
    head, sentence = verdict(before, after)
    facts = {
        "record": run.folder.parent.parent.name,
        "defense": run.folder.name,
        "metrics": run.metrics,
        "head": head,
        "sentence": sentence,
        "warnings": warnings(run, before, after, precision),
        "outcome": [_outcome(name, before[name], after[name]) for name in METRICS],
        "der": defense_effectiveness(before, after),
        "others": _others(run, before, after, others),
        "matrices": matrices,
        "by_class": figures.success_by_class(success_by_class(run.predictions)),
        "many_classes": classes > figures.MOST_CLASSES,
        "cuts": cuts,
        "p": run.p,
        "by_trigger": run.by_trigger,
        "evidence": run.metrics.get("verdict"),
        "samples": int(run.maps["samples"].max()) if run.scored else 0,
        "strips": strips(run, known) if run.scored or run.by_trigger else None,
        "precision": precision,
        "no_trigger": trigger if isinstance(trigger, str) else "",
        "twins": len(known.labels) if known else 0,
        "pictures": pictures(run, known) if known else None,
        "curves": curves(run) if run.history["train_acc"].notna().any() else [],
        "stages": _stages(run.metrics["seconds"]),
        "command": command(run.metrics["settings"], run.metrics.get("chosen_by")),
        "written": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
    }
    loader = jinja2.FileSystemLoader(PAGE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.2f}"
    environment.filters["points"] = lambda share: f"{100 * share:+.2f}".replace("-", "−")  # noqa: RUF001
    environment.filters["duration"] = duration
    environment.filters["flags"] = _flags
    return environment.get_template("report.html").render(facts)


def strips(run: Run, trigger: Trigger | None) -> dict[str, Any]:
    """What the page's script draws: every feature map of every layer, in execution order."""
    maps = run.maps
    if trigger is not None:
        maps = maps.assign(tac=trigger.tac.numpy())
        maps["tac_rank"] = maps.groupby("layer", sort=False)["tac"].rank(ascending=False, method="first").astype(int)
    maps = maps.assign(tied=run.tied(run.p))
    ps = [] if run.by_trigger else sorted({*OTHER_P, run.p})
    cuts = {p: run.cuts(p) for p in ps}
    layers = []
    for name, group in maps.groupby("layer", sort=False):
        ordered = group.sort_values("moved", ascending=False) if run.by_trigger else group.sort_values("rank")
        layer: dict[str, Any] = {
            "name": name,
            "channel": ordered["channel"].tolist(),
            "pruned": ordered["pruned"].astype(int).tolist(),
            "tied": int(ordered["tied"].sum()),
            "cuts": [cuts[p][str(name)] for p in ps],
        }
        if run.by_trigger:
            layer["moved"] = [_short(moved) for moved in ordered["moved"]]
        else:
            layer["correct"] = ordered["correct"].tolist()
            layer["margin"] = [_short(margin) for margin in ordered["margin"]]
        if trigger is not None:
            layer["tac"] = [_short(tac) for tac in ordered["tac"]]
            layer["tacRank"] = ordered["tac_rank"].tolist()
        layers.append(layer)
    scope = run.metrics["settings"]["scope"]
    return {"samples": int(maps["samples"].max()) if run.scored else 0, "p": run.p, "ps": ps, "scope": scope, "layers": layers}


def curves(run: Run) -> list[str]:
    """Fine-tuning as two charts; epoch 0 is the attacked model."""
    start = pd.DataFrame([{"epoch": -1, **run.metrics["before"]}])
    history = pd.concat([start, run.history], ignore_index=True)
    shares = figures.training_curves(history, CURVES, "Accuracy and attack success", True)
    return [shares, figures.training_curves(run.history, LOSSES, "Loss", False)]


def duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(number: float) -> float | None:
    """Four digits; None for NaN and infinity, which JSON does not have."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _flags(text: str) -> markupsafe.Markup:
    """Flags as code, so that no line breaks inside one."""
    return markupsafe.Markup(re.sub(r"(--\w+( \d+)?)", r"<code>\1</code>", str(markupsafe.escape(text))))


def _outcome(name: str, before: Interval, after: Interval) -> dict[str, Any]:
    parts = {"before": before, "after": after, "change": difference(after, before)}
    return {"name": METRICS[name], "means": MEANS[name], **parts}


def _others(
    run: Run, before: Mapping[str, Interval], after: Mapping[str, Interval], others: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Rows of the comparison: this run, then the others, all as if tested on this record's test sets."""
    if not others:
        return []
    poisoned = int(run.predictions["poisoned"].sum())
    totals = {"test_acc": len(run.predictions) - poisoned, "test_asr": poisoned, "test_ra": poisoned}
    rows = [{"name": run.folder.name, "this": True, **after, "der": defense_effectiveness(before, after)}]
    for name, shares in others.items():
        limits = {metric: wilson(share, totals[metric]) for metric, share in shares.items()}
        rows.append({"name": name, "this": False, **limits, "der": defense_effectiveness(before, limits)})
    return rows


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    whole = sum(seconds.values()) or 1.0
    return [{"name": name, "seconds": value, "share": value / whole} for name, value in seconds.items()]
