"""Reading one record's figures and one defense's result, ours or BackdoorBench's, whatever files each defense writes.

A result folder may come from anywhere: one that cannot be read becomes one warning, and the others go on.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmp_core.errors import UserError
from fmp_core.metrics import METRICS

STAMP = "sweep.json"  # written by sweeps into each result folder: what was run, with which settings
MOST_BYTES = 16 * 2**20  # no metric csv of BB comes near this
ATTACK_NAMES = {"lowfrequency": "lf", "label_consistent": "lc"}  # info.pickle's names -> those of files and leaderboard
ATTACKS = "badnet|blended|blind|bpp|ctrl|inputaware|lc|lf|lira|refool|sig|ssba|trojannn|wanet"
BB_DATASETS = ("cifar10", "cifar100", "gtsrb", "tiny", "mnist", "celeba", "imagenet")  # those BackdoorBench knows
DATASETS = "|".join(sorted((*BB_DATASETS, "digits"), key=len, reverse=True))
# Summaries of a stage that is not the defense's last (nad's teacher, the first stages of abl and dbd).
UNFINISHED_STAGES = {"nad_te", "pre_train", "unlearn", "self", "train"}


class UnreadableError(Exception):
    """A result folder that gives no result; the message says which file and why, on one line."""


@dataclass(frozen=True)
class Result:
    """What one defense left of a model (``metrics``: METRICS as fractions in [0,1]), and what is known about the run."""

    metrics: Mapping[str, float]
    source: str  # the file the numbers were read from
    ours: bool = False
    seed: int | None = None
    method: str | None = None  # the sweep's label, equal over seeds
    before: Mapping[str, float] = field(default_factory=dict)  # the attacked model, as this run tested it
    dataset: str | None = None
    model: str | None = None
    ratio: float | None = None  # share of the clean training set it was given
    test_images: int | None = None  # tested on a sample of so many images only


@dataclass(frozen=True)
class Record:
    """What is known about the attack; None where the record does not say."""

    dataset: str | None = None
    model: str | None = None
    attack: str | None = None
    pratio: float | None = None
    seed: int | None = None


def read_result(folder: Path) -> Result:
    """The result in ``record/<name>/defense/<defense>``.

    Raises:
        UnreadableError: there is none, or its file is damaged or impossible; names the file.
    """
    stamp = _read_json(folder / STAMP) if (folder / STAMP).is_file() else {}
    seed, method = _whole(stamp.get("seed")), _text(stamp.get("method"))
    path = folder / "metrics.json"
    if not path.is_file():
        path = _summary_file(folder)
        logged = {"ratio": _mapping(stamp, "settings").get("ratio")} | _logged_settings(folder)
        seed = _whole(logged.get("random_seed")) if seed is None else seed
        metrics = _fractions(_read_summary(path), path)
        return Result(metrics, str(path), seed=seed, method=method, ratio=_number(logged["ratio"]))
    content = _read_json(path)
    settings = _mapping(content, "settings")
    if not _mapping(content, "after"):
        raise UnreadableError(f"{path} has no metrics after the defense")
    return Result(
        _fractions(_mapping(content, "after"), path),
        str(path),
        ours=True,
        seed=_whole(content.get("seed")) if seed is None else seed,
        method=method,
        before=_fractions(_mapping(content, "before"), path) if _mapping(content, "before") else {},
        dataset=_text(content.get("dataset")),
        model=_text(content.get("model")),
        ratio=None if settings.get("index") else _number(settings.get("ratio")),
        test_images=_whole(content.get("test_images")) or _whole(settings.get("test_images")),
    )


def read_attack_metrics(folder: Path) -> dict[str, float]:
    """Acc, ASR and RA of the attacked model as the attack itself logged them; empty where it did not.

    Raises:
        UnreadableError: the file is damaged.
    """
    path = folder / "attack_df_summary.csv"
    return _fractions(_read_summary(path), path) if path.is_file() else {}


def read_record(folder: Path) -> Record:
    """What ``info.pickle`` says about the attack, or else what the folder's name says in BB's habit (``badnet_cifar10...``).

    Raises:
        UnreadableError: info.pickle is damaged or refused.
    """
    guess = re.match(rf"({ATTACKS})_({DATASETS})(?![a-z0-9])", folder.name)
    attack, dataset = guess.groups() if guess else (None, None)
    path = folder / "info.pickle"
    if not path.is_file():
        return Record(attack=attack, dataset=dataset)
    from fmp_core.storage.torch_file import load_torch_file  # imports torch, which takes seconds

    try:
        info = load_torch_file(path)
    except UserError as error:
        raise UnreadableError(str(error)) from None
    if not isinstance(info, Mapping):
        raise UnreadableError(f"{path} does not hold the attack's settings")
    name = _text(info.get("attack"))
    return Record(
        dataset=_text(info.get("dataset")) or dataset,
        model=_text(info.get("model")),
        attack=ATTACK_NAMES.get(name.lower(), name.lower()) if name else attack,
        pratio=_number(info.get("pratio")),
        seed=_whole(info.get("random_seed")),
    )


def _summary_file(folder: Path) -> Path:
    """The csv that holds the defense's last word; ft-sam keeps it in ``log/``, fp calls it finetune."""
    summaries = [path for place in (folder, folder / "log") for path in sorted(place.glob("*_df_summary.csv"))]
    stages = [path for path in summaries if _stage(path) not in UNFINISHED_STAGES]
    final = [path for path in stages if _stage(path) != "finetune"] or stages
    if len(final) == 1:
        return final[0]
    if final:
        raise UnreadableError(f"{folder} holds several results ({', '.join(path.name for path in final)})")
    raise UnreadableError(f"{folder} holds no metrics.json and no *_df_summary.csv; the defense may not have ended")


def _stage(path: Path) -> str:
    return path.name.removesuffix("_df_summary.csv")


def _read_summary(path: Path) -> dict[str, Any]:
    """The last values in a summary: row ``last`` of the three-row form, or the one row of clp, anp, rnp, nc."""
    try:
        rows = list(csv.DictReader(_read_text(path).splitlines()))
    except csv.Error as error:
        raise UnreadableError(f"{path} is not a csv table ({error})") from None
    if not rows:
        raise UnreadableError(f"{path} has no rows")
    row = next((row for row in rows if row.get("") == "last"), rows[-1])
    absent = [name for name in METRICS if row.get(name) in (None, "")]
    if absent:
        raise UnreadableError(f"{path} has no {', '.join(absent)}")
    values: dict[str, Any] = {name: _number(row[name], row[name]) for name in METRICS}
    if _stage(path) == "mcr":  # BB's mcr stores them the other way round
        values["test_acc"], values["test_asr"] = values["test_asr"], values["test_acc"]
    if _stage(path) == "npd":  # the one defense that writes percent
        values = {name: value / 100 if isinstance(value, float) else value for name, value in values.items()}
    return values


def _fractions(values: Mapping[str, Any], path: Path) -> dict[str, float]:
    result = {}
    for name in METRICS:
        value = values.get(name)
        number = None if isinstance(value, bool) else _number(value)
        if number is None or not 0 <= number <= 1:
            raise UnreadableError(f"{path} has {name} {str(value)[:40]!r}, which is no fraction of 1")
        result[name] = number
    return result


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe would never end
            raise UnreadableError(f"{path} is no regular file")
        if path.stat().st_size > MOST_BYTES:
            raise UnreadableError(f"{path} is larger than {MOST_BYTES >> 20} MiB, which no result is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path} cannot be read ({' '.join(str(error).split())[:120]})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UnreadableError(f"{path} does not hold a JSON object")
    return content


def _logged_settings(folder: Path) -> dict[str, float]:
    """Seed and share of clean data of a BB run: its log begins with all settings."""
    for path in filter(Path.is_file, [*sorted(folder.glob("log/*.log")), *sorted(folder.glob("*.log"))]):
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.read(2**16)
        seed = re.search(r"'random_seed': (\d{1,10})\b", head)
        if seed:
            ratio = re.search(r"'ratio': ([\d.e-]{1,20})[,}]", head)
            return {"random_seed": int(seed[1])} | ({"ratio": _number(ratio[1])} if ratio else {})
    return {}


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, otherwise: Any = None) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return number if math.isfinite(number) else otherwise


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
