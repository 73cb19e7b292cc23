"""What a report says in words: the verdict, the warnings, and the command that repeats the run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from fmp_core.models.activation_change import Precision
from fmp_core.report.data import Run
from fmp_core.report.intervals import Interval
from fmp_core.settings import PRESETS, Settings

REMOVED = 0.10  # ASR below which a backdoor counts as removed, as backdoor papers have it
WEAKENED = 0.5  # of the ASR before
MUCH_ACCURACY = 0.03
FEW_FRG_IMAGES = 16
FEW_CLEAN_IMAGES = 250
CHANCE = 0.05  # a random choice does as well at least this often: the ranking found nothing


def verdict(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> tuple[str, str]:
    """A headline about the backdoor and a sentence with its price."""
    asr, asr_before = after["test_asr"].value, before["test_asr"].value
    if asr_before < REMOVED:
        head = "This record has no working backdoor to remove"
    elif asr < REMOVED:
        head = "The backdoor is removed"
    elif asr < WEAKENED * asr_before:
        head = "The backdoor is weakened, not removed"
    else:
        head = "The backdoor still works"
    change = 100 * (after["test_acc"].value - before["test_acc"].value)
    price = "did not change" if abs(change) < 0.005 else f"{'rose' if change > 0 else 'fell'} by {abs(change):.2f} points"
    sentence = (
        f"The trigger now succeeds on {100 * asr:.2f} % of triggered test images (before: {100 * asr_before:.2f} %). "
        f"Accuracy on clean images {price}, to {100 * after['test_acc'].value:.2f} %."
    )
    return head, sentence


def warnings(
    run: Run, before: Mapping[str, Interval], after: Mapping[str, Interval], precision: Precision | None
) -> list[tuple[str, str]]:
    """What a reader should know before trusting the numbers: (what, why it matters) pairs."""
    found = []
    metrics = run.metrics
    clean, pruned = int(metrics.get("clean_images", 0)), int(run.maps["pruned"].sum())
    selection = metrics["settings"].get("selection", "frg")
    if not run.scored and not run.by_trigger:
        by = run.metrics.get("chosen_by") or f"--selection {selection}"
        found.append((f"This is an ablation ({by}).", "No feature map was scored by FRG."))
    elif not pruned:
        by_p = f"No layer has {run.p} feature maps or more, so N/p is 0; lower --p."
        by_budget = f"Pruning any costs more clean accuracy than --budget {metrics['settings'].get('budget')} allows."
        found.append(("Nothing was pruned.", by_budget if run.by_trigger else by_p))
    tied = int(run.tied(run.p).sum()) if run.scored else 0
    if tied:
        why = f"{pruned} were pruned. Among equal scores the mean margin decided; more --frg_samples tell them apart."
        found.append((f"{tied} feature maps are tied where the cut falls.", why))
    if run.scored and precision is not None and precision.chosen and precision.chance > CHANCE:
        why = (
            f"{precision.hits} of the {precision.chosen} pruned maps are among those the trigger moves most; a random choice "
            f"does at least as well with probability {precision.chance:.2f}. Do not credit the ranking with the change in ASR."
        )
        found.append(("The ranking is no better than random on this record.", why))
    drop = before["test_acc"].value - after["test_acc"].value
    if drop > MUCH_ACCURACY:
        found.append((f"Accuracy fell by {100 * drop:.1f} points.", "More than 3 points is a high price; try a smaller --lr."))
    samples = int(run.maps["samples"].max()) if run.scored else FEW_FRG_IMAGES
    if samples < FEW_FRG_IMAGES:
        why = f"Scores are multiples of 1/{samples}, so many feature maps share one; raise --frg_samples."
        found.append((f"Each feature map was scored on {samples} images only.", why))
    if clean < FEW_CLEAN_IMAGES:
        found.append((f"The clean subset has {clean} images only.", "Fine-tuning on so few may overfit; raise --ratio."))
    poisoned = int(run.predictions["poisoned"].sum())
    if min(poisoned, len(run.predictions) - poisoned) < 1000:
        why = f"{len(run.predictions) - poisoned} clean and {poisoned} triggered images: read the intervals, not the digits."
        found.append(("The test sets are small.", why))
    return found


ROWS_DIFFER_IN = ("preset", "selection", "scope", "masked", "unlearn", "distill")  # of ablate.py


def command(settings: Mapping[str, Any], chosen_by: str | None = None) -> str:
    """The command of a run with these settings; what equals the default of the program or of the preset is left out.

    ``chosen_by``: the script of ours and its flags (``ablate.py --rows oracle``), if FMP alone cannot repeat the run.
    """
    defaults = dataclasses.asdict(Settings()) | PRESETS.get(settings.get("preset", "paper"), {}) | {"preset": "paper"}
    words = ["python", "defense/fmp.py"]
    if chosen_by:
        words = ["python", *f"record_scripts/{chosen_by}".split()]
        settings = {name: value for name, value in settings.items() if name not in (*ROWS_DIFFER_IN, "defense_name")}
    for name, value in settings.items():
        default = defaults.get(name)
        same = list(value) == list(default) if isinstance(default, tuple) and value is not None else value == default
        if not same and value is not None:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return shlex.join(words)
