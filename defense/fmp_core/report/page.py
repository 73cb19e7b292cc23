"""``report.html``: one self-contained page about one run."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd

from fmp_core.data.attack_record import AttackRecord, read_attack_record
from fmp_core.data.datasets import open_split
from fmp_core.data.names import ATTACK_FILE
from fmp_core.errors import UserError
from fmp_core.inputs import read_test_data, record_folder
from fmp_core.inversion.verdict import in_words
from fmp_core.metrics import HEADLINES, MetricValues
from fmp_core.models.evaluate import TestData
from fmp_core.report import figures
from fmp_core.report.data import Run, Trigger, load_attacked, measure_trigger, read_run, read_summary
from fmp_core.report.findings import command, headline, warnings
from fmp_core.report.pictures import pictures
from fmp_core.report.strips import own_pruning, p_table, strips
from fmp_core.results.intervals import difference, rating, wilson
from fmp_core.results.predictions import confusion, success_by_class
from fmp_core.results.read import read_result
from fmp_core.results.removal import DIVERGED, attack_outcome
from fmp_core.results.run_folder import RunFolder
from fmp_core.settings import Settings
from fmp_core.storage.files import refuse_links_out_of, write_text
from fmp_core.system.devices import choose_device

ASSETS = Path(__file__).parent / "assets"  # template, style and script
MEANINGS = {
    "test_acc": "clean images, right class",
    "test_asr": "triggered images, attacker's class",
    "test_ra": "triggered images, true class",
}


def report_on(settings: Settings, compare: Sequence[str]) -> Path:
    """:func:`write_report` about the finished run that ``settings`` (of record, folders and device) names."""
    home = record_folder(settings.record_root, str(settings.result_file))
    folder = RunFolder.of(settings, home).path
    if not settings.save_folder:
        refuse_links_out_of(home, folder)
    summary = read_summary(folder) if folder.is_dir() else None
    used = summary.settings if summary else {}
    record = read_attack_record(home, used.get("mean"), used.get("std"))
    if summary is None:
        raise UserError(f"{folder} does not exist; run the defense first, or check --defense_name.")
    test_set = open_split(settings.dataset_path, record.dataset, False, record.image_size)
    data = read_test_data(record, test_set, choose_device(settings.device).device, summary.test_images)
    return write_report(record, folder, data, compare)


def write_report(record: AttackRecord, folder: Path, data: TestData, compare: Sequence[str] = ()) -> Path:
    """Write ``folder/report.html`` about the run whose files ``folder`` holds, tested on ``data``; returns its path.

    Poisoned test images are looked at here, and the run is over: nothing a model or a selection depends on is written.
    ``compare`` names other result folders beside ``folder``, whose figures stand in a table. Raises UserError: a file is
    missing or damaged; nothing is written.
    """
    others = {name: _other(folder.parent / name, record.digest) for name in compare}
    summary = read_summary(folder)
    if compare and summary.test_images:
        raise UserError(f"--compare: {folder} was tested on {summary.test_images} images only; run it without --test_images.")
    if summary.attack_result != record.digest:
        raise UserError(
            f"{record.folder / ATTACK_FILE} is not the model that the run in {folder} repaired; run the defense again."
        )
    model, layers = load_attacked(record, summary.settings, data.clean_images.device)
    run = read_run(folder, summary, record.num_classes, layers)
    try:
        trigger, unknown = measure_trigger(model, layers, data), ""
    except UserError as error:
        trigger, unknown = None, str(error)
    path = folder / "report.html"
    write_text(path, page(run, record.num_classes, trigger, unknown, others))
    return path


def _other(folder: Path, attacked: str) -> MetricValues:
    if not folder.is_dir():
        raise UserError(f"--compare {folder.name}: {folder} does not exist; run that defense first.")
    try:
        result = read_result(folder)
    except UserError as error:
        raise UserError(f"--compare {folder.name}: {str(error).rstrip('.')}; run that defense first.") from None
    if result.attack_result not in (None, attacked):
        raise UserError(f"--compare {folder.name}: {folder} is of another attack_result.pt; run that defense again.")
    if result.test_images:
        raise UserError(
            f"--compare {folder.name}: {folder} was tested on {result.test_images} images only; run that defense without "
            "--test_images."
        )
    return result.metrics


def page(run: Run, num_classes: int, trigger: Trigger | None, unknown: str, others: Mapping[str, MetricValues]) -> str:
    """The page's HTML. ``unknown`` says in a sentence why ``trigger`` is None; ``others``: METRICS by defense."""
    own = own_pruning(run)
    precision = trigger.precision(own.mask) if trigger else None
    diverged = (run.summary.removal or {}).get("outcome") == DIVERGED
    outcome, by_class = attack_outcome(run.predictions, diverged), success_by_class(run.predictions)
    facts = {
        "run": run,
        "summary": run.summary,
        "headline": headline(outcome, run.shares("before"), run.shares("after"), run.summary.verdict),
        "verdict": in_words(run.summary.verdict) if run.summary.verdict else None,
        "warnings": list(warnings(run, own, precision, len(trigger.labels) if trigger else 0)),
        "names": HEADLINES,
        "means": MEANINGS,
        "others": _others(run, others),
        "matrices": _matrices(run, num_classes),
        "by_class": figures.success_by_class(by_class) if len(by_class) else None,
        "one_target": run.predictions.query("poisoned")["target"].nunique() < 2,
        "many_classes": num_classes > figures.MOST_CLASSES,
        "p_table": p_table(run, trigger),
        "strips": strips(run, trigger) if run.scored or run.by_trigger else None,
        "precision": precision,
        "trigger": trigger,
        "trigger_unknown": unknown,
        "pictures": pictures(run, trigger) if trigger else None,
        "curves": _curves(run) if run.history["train_acc"].notna().any() else [],
        "command": command(run.summary.settings, run.summary.chosen_by),
        "written": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
    }
    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.2f}"
    environment.filters["points"] = lambda share: f"{100 * share:+.2f}".replace("-", "−")  # noqa: RUF001
    environment.filters["duration"] = _duration
    environment.filters["flags"] = _flags
    return environment.get_template("report.html").render(facts)


def _curves(run: Run) -> list[str]:
    """Fine-tuning as two charts; epoch 0 is the attacked model."""
    start = pd.DataFrame([{"epoch": -1, **run.summary.before}])
    history = pd.concat([start, run.history], ignore_index=True)
    shares = figures.training_curves(history, figures.SHARES, "Accuracy and attack success", True)
    return [shares, figures.training_curves(run.history, figures.LOSSES, "Loss", False)]


def _duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _flags(text: str) -> markupsafe.Markup:
    """Flags as code, so that no line breaks inside one."""
    return markupsafe.Markup(re.sub(r"(--\w+( \d+(\.\d+)?)?)", r"<code>\1</code>", str(markupsafe.escape(text))))


def _matrices(run: Run, num_classes: int) -> list[dict[str, str]]:
    matrices = []
    kinds = ("clean", "triggered") if "test_asr" in run.tested else ("clean",)
    for kind, when in itertools.product(kinds, ("before", "after")):
        counts = confusion(run.predictions, when, kind == "triggered", num_classes)
        svg = figures.confusion_matrix(counts, f"Confusion matrix of {kind} test images {when} the defense")
        matrices.append({"title": f"{kind.capitalize()} images, {when}", "svg": svg})
    return matrices


def _others(run: Run, others: Mapping[str, MetricValues]) -> list[dict[str, Any]]:
    """Rows of the comparison: this run, then the others, all as if tested on this record's test sets."""
    before = run.shares("before")
    rows = [{"name": run.folder.name, "this": True, **run.shares("after"), "der": run.effectiveness()}]
    for name, shares in others.items():
        known = {metric: share for metric in run.tested if (share := shares[metric]) is not None}
        limits = {metric: wilson(share, len(run.hits(metric, "after"))) for metric, share in known.items()}
        drops = {metric: difference(before[metric], limits[metric]) for metric in known}
        der = rating(drops["test_asr"], drops["test_acc"]) if "test_asr" in drops else None
        rows.append({"name": name, "this": False, **limits, "der": der})
    return rows if others else []
