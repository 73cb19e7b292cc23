"""All results below a record root as one tidy table, and BackdoorBench's published leaderboard beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from fmp_core.errors import UserError
from fmp_core.metrics import METRICS, defense_effectiveness
from fmp_core.results.read import Record, UnreadableError, read_attack_metrics, read_record, read_result

BASELINE = "no defense"  # the attacked model; the leaderboard's name for it
COLUMNS = [
    *("record", "defense", *METRICS, "der", "method", "seed"),
    *("dataset", "model", "attack", "pratio", "record_seed", "origin", "source"),
]


def collect(root: str | Path, warn: Callable[[str], None]) -> pd.DataFrame:
    """One row per ``<root>/*/defense/*`` and one ``no defense`` row per record; metrics are fractions in [0,1].

    ``origin`` is ``ours``, ``backdoorbench`` or ``attack`` (the attacked model). ``method`` is ``defense`` without the seed,
    so rows that differ only in seeds share it. ``warn`` gets one line for every file that could not be read.

    Raises:
        UserError: ``root`` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; name the folder that holds the attack records.")
    rows: list[dict[str, Any]] = []
    for folder in sorted(path.parent for path in root.glob("*/defense") if path.is_dir()):
        rows += _record_rows(folder, warn)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64", "record_seed": "Int64"})


def _record_rows(folder: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    record, baseline = Record(), {}
    try:
        record = read_record(folder)
    except UnreadableError as problem:
        warn(str(problem))
    try:
        baseline = read_attack_metrics(folder)
    except UnreadableError as problem:
        warn(str(problem))
    results = {}
    for place in sorted(path for path in (folder / "defense").iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            if {path.name for path in place.iterdir()} <= {"cache"}:
                continue  # scores kept for siblings: nothing was run under this name
            results[place.name] = read_result(place)
        except (UnreadableError, OSError) as problem:
            warn(str(problem))
    if not baseline:  # a record without its attack's csv: the model as our own run tested it
        baseline = next((dict(result.before) for result in results.values() if result.before), {})
    about = {
        "record": folder.name,
        "dataset": record.dataset or next((r.dataset for r in results.values() if r.dataset), None),
        "model": record.model or next((r.model for r in results.values() if r.model), None),
        "attack": record.attack,
        "pratio": record.pratio,
        "record_seed": record.seed,
    }
    rows: list[dict[str, Any]] = []
    if baseline:
        rows.append({**about, "defense": BASELINE, "method": BASELINE, **baseline, "origin": "attack", "source": str(folder)})
    for name, result in results.items():
        after = dict(result.metrics)
        der = defense_effectiveness(baseline, after) if baseline else None
        method = result.method or re.sub(rf"-s{result.seed}$", "", name)
        row = {**about, "defense": name, "method": method, **after, "der": der, "seed": result.seed, "source": result.source}
        rows.append(row | {"origin": "ours" if result.ours else "backdoorbench"})
    return rows


def read_leaderboard(path: str | Path) -> pd.DataFrame:
    """BackdoorBench's leaderboard csv in our columns, origin ``published``; runs that failed there (-1, empty) are left out.

    Raises:
        UserError: it is not that file.
    """
    try:
        board = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--leaderboard {path} cannot be read as csv ({' '.join(str(error).split())[:120]}).") from None
    names = {"backbone": "model", "attack_name": "attack", "defense_name": "defense", "ratio": "pratio"}
    absent = [name for name in ("dataset", *names, *METRICS) if name not in board]
    if absent:
        raise UserError(f"--leaderboard {path} lacks the columns {', '.join(absent)}; it is not BackdoorBench's leaderboard.")
    board = board.rename(columns=names)
    board[list(METRICS)] = board[list(METRICS)].apply(pd.to_numeric, errors="coerce")
    board = board[board[list(METRICS)].ge(0).all(axis=1) & board[list(METRICS)].le(1).all(axis=1)]
    where = ["dataset", "model", "attack", "pratio"]
    board = board.drop_duplicates([*where, "defense"]).assign(origin="published", source=str(path), record="")
    attacked = board[board["defense"] == BASELINE].set_index(where)[list(METRICS)]
    before = board[where].join(attacked, on=where)[list(METRICS)]
    asr_drop, acc_drop = ((before[name] - board[name]).clip(lower=0) for name in ("test_asr", "test_acc"))
    board["der"] = ((asr_drop - acc_drop + 1) / 2).where(board["defense"] != BASELINE)
    board["method"] = board["defense"] + " (published)"
    return board.reindex(columns=COLUMNS).astype({"seed": "Int64", "record_seed": "Int64"}).reset_index(drop=True)


def join_leaderboard(frame: pd.DataFrame, board: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the published rows that have a dataset, model, attack and poison rate of one of its records."""
    where = ["dataset", "model", "attack", "pratio"]
    ours = {tuple(row) for row in frame[where].dropna().itertuples(index=False)}
    wanted = [tuple(row) in ours for row in board[where].itertuples(index=False)]
    return pd.concat([frame, board[wanted]], ignore_index=True) if any(wanted) else frame
