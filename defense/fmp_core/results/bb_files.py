"""What BackdoorBench's defenses leave in a result folder: a csv summary of one form or another, and a log."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmp_core.errors import UserError
from fmp_core.metrics import METRICS
from fmp_core.results.values import finite_number, read_text

# Summaries of a stage that is not the defense's last (nad's teacher, the first stages of abl and dbd).
UNFINISHED_STAGES = {"nad_te", "pre_train", "unlearn", "self", "train"}


def summary_file(folder: Path) -> Path:
    """The csv that holds the defense's last word: of ft-sam in ``log/``, of fp called finetune, as abl calls a middle stage.

    Raises UserError: there is none, or there are several.
    """
    summaries = [path for place in (folder, folder / "log") for path in sorted(place.glob("*_df_summary.csv"))]
    stages = [path for path in summaries if _stage(path) not in UNFINISHED_STAGES]
    final = [path for path in stages if _stage(path) != "finetune"]
    if not final and not any(_stage(path) == "pre_train" for path in summaries):
        final = stages
    if len(final) == 1:
        return final[0]
    if final:
        raise UserError(f"{folder} holds several results ({', '.join(path.name for path in final)})")
    raise UserError(f"{folder} holds no metrics.json and no *_df_summary.csv; the defense may not have ended")


def _stage(path: Path) -> str:
    return path.name.removesuffix("_df_summary.csv")


def read_summary(path: Path) -> dict[str, float]:
    """The last METRICS in a summary: row ``last`` of the three-row form, or the one row of clp, anp, rnp, nc."""
    try:
        rows: list[dict[str, Any]] = list(csv.DictReader(read_text(path).splitlines()))
    except csv.Error as error:
        raise UserError(f"{path} is not a csv table ({error})") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    row = next((row for row in rows if row.get("") == "last"), rows[-1])
    if _stage(path) == "rnp" and row.get("") == "last":  # of its unlearning or recovering; the final file has another form
        raise UserError(f"{path} is of a stage before rnp's last; the defense did not end, run it again")
    if absent := [name for name in METRICS if row.get(name) in (None, "")]:
        raise UserError(f"{path} has no {', '.join(absent)}")
    if _stage(path) == "mcr":  # BB's mcr stores them the other way round
        row["test_acc"], row["test_asr"] = row["test_asr"], row["test_acc"]
    return fractions(row, path, whole=100 if _stage(path) == "npd" else 1)  # the one defense that writes percent


def fractions(values: Mapping[str, Any], path: Path, whole: int = 1) -> dict[str, float]:
    """METRICS among ``values``, numbers or their texts in [0, ``whole``], as fractions in [0,1].

    Raises UserError, naming the file ``path`` they are from: one is absent, no number, or outside.
    """
    result = {}
    for name in METRICS:
        number = finite_number(values.get(name))
        if number is None or not 0 <= number / whole <= 1:
            raise UserError(f"{path} has {name} {str(values.get(name))[:40]!r}, which is no fraction of 1")
        result[name] = number / whole
    return result


def logs_until(folder: Path, written: float) -> list[Path]:
    """BB's logs in a result folder, the newest first, from the one of the run that wrote a file at the time ``written``.

    A later run that did not end left a log, too. A run's log is last written when its results are.
    """
    logs = [path for place in ("log/*.log", "*.log") for path in sorted(folder.glob(place), reverse=True) if path.is_file()]
    apart = [round(abs(path.stat().st_mtime - written) / 60) for path in logs]  # minutes; copied files may all have one time
    return logs[apart.index(min(apart)) :] if logs else []


def logged_settings(logs: Sequence[Path]) -> dict[str, str]:
    """All settings of a BB run, as the first of ``logs`` that has them printed them at its beginning."""
    for path in logs:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.read(2**16)
        for printed in re.findall(r"\{'\w+': .*(?:\n .*)*", head):
            if seed := re.search(r"'random_seed': (\d{1,10})\b", printed):
                found = dict(re.findall(r"'(\w+)': (\([^)\n]*\)|\[[^]]*\]|'[^'\n]*'|[^,}\n]+)", printed))
                return {**{key: " ".join(value.split()) for key, value in found.items()}, "random_seed": seed[1]}
    return {}


def seconds_of_bb(folder: Path) -> tuple[float | None, float | None]:
    """Elapsed and processor time, which ``run_defense.py`` noted at the end of its log."""
    path = folder / "run_defense.log"
    lines = read_text(path).splitlines() if path.is_file() else []
    found = re.fullmatch(r"exit code 0 after (\d+) s; CPU (\d+) s", lines[-1]) if lines else None
    return (float(found[1]), float(found[2])) if found else (None, None)
