"""What a report says in words: the verdict, the warnings, and the command that repeats the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from fmp_core.errors import UserError
from fmp_core.fields import as_text
from fmp_core.models.activation_change import Precision
from fmp_core.report.data import Run
from fmp_core.report.strips import Pruning
from fmp_core.results.intervals import Interval
from fmp_core.results.removal import NOT_TESTED, OUTCOMES
from fmp_core.results.summary import is_high_price
from fmp_core.selection.ablation import ROWS_SET
from fmp_core.settings import changed, load_settings

FEW_FRG_IMAGES = 16
WARN_BELOW = 250
FEW_TEST_IMAGES = 1000
FEW_PAIRS = 64
CHANCE = 0.05  # a random selection does as well at least this often: the ranking found nothing


def headline(
    outcome: Mapping[str, Any],
    before: Mapping[str, Interval],
    after: Mapping[str, Interval],
    found: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """A headline about the ``outcome`` (of ``attack_outcome``), and sentences with the figures behind it and the price.

    Without a triggered image it is about ``found``, the verdict of trigger inversion in metrics.json.
    """
    head, sentences = OUTCOMES[outcome["outcome"], outcome["certain"]], []
    if outcome["outcome"] != NOT_TESTED:
        sentences = _success(outcome)
    elif found and not found["too_few"]:
        to = "all-to-all" if found["target"] == "all-to-all" else f"target class {found['target']}"
        head = f"This model is judged backdoored, {to}" if found["backdoored"] else "This model is not shown to be backdoored"
        sentences = ["No triggered image is known, so attack success was not measured."]
    accuracy, change = 100 * after["test_acc"].value, 100 * (after["test_acc"].value - before["test_acc"].value)
    moved = f"{'rose' if change > 0 else 'fell'} by {abs(change):.2f} points, to" if abs(change) >= 0.005 else "stayed at"
    return head, " ".join([*sentences, f"Accuracy on clean images {moved} {accuracy:.2f} %."])


def _success(outcome: Mapping[str, Any]) -> list[str]:
    """Sentences with the figures behind ``outcome`` (of ``attack_outcome``)."""
    now, then, chance = 100 * outcome["asr_after"], 100 * outcome["asr_before"], outcome["chance"]
    sentences = [f"The trigger now succeeds on {now:.2f} % of triggered test images (before: {then:.2f} %)."]
    if chance is not None:
        low, high = (100 * outcome[limit] for limit in ("excess_low", "excess_high"))
        sentences.append(
            f"Without any trigger, {100 * chance:.2f} % of clean images of other classes get the attacker's class, so the "
            f"trigger itself adds {100 * outcome['excess']:.1f} points (95 % interval {low:.1f} to {high:.1f})."
        )
    if not outcome["certain"]:
        sentences.append("The test set is too small to say more.")
    return sentences


def warnings(run: Run, own: Pruning, precision: Precision | None, pairs: int) -> Iterator[tuple[str, str]]:
    """What a reader should know before trusting the numbers: (what, why it matters) pairs.

    ``own`` is the run's pruning, ``precision`` that of it against TAC if it is known, measured on so many ``pairs``.
    """
    summary, pruned, tied = run.summary, int(own.mask.sum()), int(own.tied.sum())
    for sentence in summary.warnings:
        what, stop, why = sentence.partition(". ")
        yield what + stop.strip(), why
    if summary.test_images:
        why = (
            f"An even sample of at most {summary.test_images} images of each test set; leave --test_images out for a full test."
        )
        yield "This is a quick look, not tested on all images.", why
    drop = run.hits("test_acc", "before").mean() - run.hits("test_acc", "after").mean()
    if is_high_price(drop):
        pruning = "a smaller --budget" if run.by_trigger else "a larger --p"
        less = "a smaller --lr" if summary.settings["epochs"] else f"{pruning}, or --epochs, which pruning alone went without"
        yield f"Accuracy fell by {100 * drop:.1f} points.", f"More than 3 points is a high price; try {less}."
    if not run.scored and not run.by_trigger:
        by = summary.chosen_by or f"--selection {summary.settings['selection']}"
        yield f"This is an ablation ({by}).", "No feature map was scored by FRG."
    elif not pruned:
        by_p = f"No layer has {run.p} feature maps or more, so N/p is 0; lower --p."
        by_budget = f"Pruning any costs more clean accuracy than --budget {summary.settings['budget']} allows."
        yield "Nothing was pruned.", by_budget if run.by_trigger else by_p
    if tied:
        more = "; more --frg_samples tell them apart" if run.scores.samples < summary.clean_images else ""
        why = f"{pruned} were pruned. Among equal scores the mean margin decided{more}."
        yield f"{tied} feature maps are tied where the cut falls.", why
    if run.scored and precision and precision.chosen and precision.chance > CHANCE and pairs >= FEW_PAIRS:
        why = (
            f"{precision.hits} of {precision.chosen} pruned maps are among those whose activation the trigger changes most; "
            f"a random selection does at least as well with probability {precision.chance:.2f}. Do not credit the ranking with "
            "the change in ASR."
        )
        yield "The ranking is no better than random on this record.", why
    if 0 < pairs < FEW_PAIRS:
        why = "The record holds few poisoned images whose clean counterpart is known."
        sampled = "Few poisoned images tested have their clean counterpart among those tested; "
        why = sampled + "leave --test_images out, or raise it." if summary.test_images else why
        yield f"What the trigger changes was measured on {pairs} pairs of images only.", why
    if run.scored and (samples := run.scores.samples) < FEW_FRG_IMAGES:
        few = "one image" if samples == 1 else f"{samples} images"
        yield f"Each feature map was scored on {few} only.", "So many feature maps share a score; raise --frg_samples."
    if summary.clean_images < WARN_BELOW:
        why = "Fine-tuning on so few may overfit" if summary.settings["epochs"] else "So few say little of the feature maps"
        why += "; raise --ratio."
        yield f"The clean subset has {summary.clean_images} images only.", why
    tested, triggered = len(run.hits("test_acc", "after")), len(run.hits("test_asr", "after"))
    if tested < FEW_TEST_IMAGES or 0 < triggered < FEW_TEST_IMAGES:
        why = f"{tested} clean and {triggered or 'no'} triggered images: read the intervals, not the digits."
        yield "The test sets are small.", why


def command(settings: Mapping[str, Any], selected_by: str | None = None) -> str:
    """The command of a run with these settings; what it takes from the program's defaults or the preset is left out.

    ``selected_by``: the script of ours and its flags (``ablate.py --rows oracle``), if FMP alone cannot repeat the run; or a
    function of somebody's own (``FMP(select=...)``), and then the call is returned.
    """
    words, flags = ["python", "defense/fmp.py"], _flags(settings)
    if selected_by and selected_by.startswith("FMP("):
        return f"{selected_by.replace('FMP(', f'FMP({flags!r}, ', 1)}.defense({settings['result_file']!r})"
    if selected_by:
        words = ["python", *f"record_scripts/{selected_by}".split()]
        flags = {name: value for name, value in flags.items() if name not in ROWS_SET}
    for name, value in flags.items():
        words += [f"--{name}", as_text(value)]
    return shlex.join(words)


def _flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a command must name: those that differ from the defaults, or from the settings file it will read."""
    flags, preset = changed(settings), settings.get("preset", "paper")
    with suppress(UserError):  # a damaged file, which the command itself will refuse
        read = vars(load_settings({}))
        if "preset" in flags or read["preset"] != preset:
            flags, read = {"preset": preset, **flags}, vars(load_settings({"preset": preset}))
        others = {name: value for name, value in settings.items() if name in read and value is not None}
        flags |= {name: value for name, value in others.items() if as_text(value) != as_text(read[name])}
    return flags
