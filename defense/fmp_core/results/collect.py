"""All results below a record root as one tidy table, and BackdoorBench's published leaderboard beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fmp_core.errors import UserError
from fmp_core.metrics import HEADLINES, METRICS, ratings
from fmp_core.results.read import Record, Result, UnreadableError, read_attack_metrics, read_record, read_result

BASELINE = "no defense"  # the attacked model; the leaderboard's name for it
MEASURED = f"{BASELINE} (our test)"  # the same, where our figures are not those that the attack logged
DEEPEST = 4  # levels of folders that are searched for records
POINT = 0.01  # figures of one model that differ by more were not measured alike
SETTING = ["dataset", "model", "attack", "pratio"]
COLUMNS = [
    *("record", "defense", *HEADLINES, "method", "seed", "ratio", "test_images"),
    *(*SETTING, "record_seed", "origin", "baseline", "source"),
]
WHOLE_NUMBERS = ("seed", "test_images", "record_seed")


def collect(root: str | Path, warn: Callable[[str], None]) -> pd.DataFrame:
    """One row per ``<record>/defense/*`` and one ``no defense`` row per record; metrics are fractions in [0,1].

    ``record`` is the path below ``root``. ``origin`` is ``ours``, ``backdoorbench`` or ``attack`` (the attacked model).
    ``method`` is ``defense`` without the seed, so rows that differ only in seeds share it. ``baseline`` says whose test of the
    attacked model DER and RIR compare with: ``attack`` (what the attack logged) or ``our test``. ``ratio`` is the share of
    clean data the defense had, ``test_images`` the size of the sample where it was not tested on all. ``warn`` gets one line
    for every file that could not be read, and where the attack's figures contradict ours.

    Raises:
        UserError: ``root`` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; name the folder that holds the attack records.")
    rows: list[dict[str, Any]] = []
    for folder in record_folders(root):
        rows += _record_rows(folder, folder.relative_to(root).as_posix(), warn)
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(WHOLE_NUMBERS, "Int64"))


def record_folders(root: Path) -> Iterator[Path]:
    """The folders below ``root``, up to ``DEEPEST`` levels, that hold a folder ``defense``; nothing in a record is searched."""
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        is_record = folder != root and ("defense" in folders or "attack_result.pt" in files)
        if is_record and "defense" in folders:
            yield folder
        deepest = is_record or len(folder.relative_to(root).parts) == DEEPEST  # links may form a ring
        folders[:] = sorted(name for name in folders if not deepest and not name.startswith("."))


def _record_rows(folder: Path, name: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    record, logged = Record(), {}
    try:
        record = read_record(folder)
    except UnreadableError as problem:
        warn(str(problem))
    try:
        logged = read_attack_metrics(folder)
    except UnreadableError as problem:
        warn(str(problem))
    results = _read_results(folder, warn)
    about = {
        "record": name,
        "dataset": record.dataset or next((r.dataset for r in results.values() if r.dataset), None),
        "model": record.model or next((r.model for r in results.values() if r.model), None),
        "attack": record.attack,
        "pratio": record.pratio,
        "record_seed": record.seed,
        "source": str(folder),
    }
    tested: Mapping[str, float] = next((r.before for r in results.values() if r.before and not r.test_images), {})
    rows: list[dict[str, Any]] = []
    if logged or tested:
        rows.append({**about, "defense": BASELINE, "method": BASELINE, **(logged or tested), "origin": "attack"})
    if contradicts(logged, tested):
        rows.append({**about, "defense": MEASURED, "method": MEASURED, **tested, "origin": "attack"})
        warn(contradiction(name, logged, tested))
    for defense, result in results.items():
        own_test = bool(result.before) and (not logged or bool(result.test_images) or contradicts(logged, result.before))
        before = result.before if own_test else logged or tested
        row = {**about, "defense": defense, **result.metrics, **(ratings(before, result.metrics) if before else {})}
        row |= {"method": result.method or re.sub(rf"-s{result.seed}$", "", defense), "seed": result.seed}
        row |= {"ratio": result.ratio, "test_images": result.test_images, "source": result.source}
        row |= {"origin": "ours" if result.ours else "backdoorbench"}
        rows.append(row | {"baseline": None if not before else "attack" if before is logged else "our test"})
    return rows


def _read_results(folder: Path, warn: Callable[[str], None]) -> dict[str, Result]:
    results = {}
    for place in sorted(path for path in (folder / "defense").iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            if {path.name for path in place.iterdir()} <= {"cache"}:
                continue  # scores kept for siblings: nothing was run under this name
            results[place.name] = read_result(place)
        except (UnreadableError, OSError) as problem:
            warn(str(problem))
    return results


def contradicts(logged: Mapping[str, float], tested: Mapping[str, float]) -> bool:
    """Whether two tests of one model, METRICS in [0,1] or nothing, differ by more than a point."""
    return bool(logged and tested) and any(abs(logged[name] - tested[name]) > POINT for name in METRICS)


def contradiction(record: str, logged: Mapping[str, float], tested: Mapping[str, float]) -> str:
    """The warning that the attack's figures of ``record`` are not ours, with both."""
    both = (", ".join(f"{HEADLINES[name]} {100 * figures[name]:.2f}" for name in METRICS) for figures in (logged, tested))
    return (
        f"{record}: the attack logged {next(both)} for its model, our test gave {next(both)}; DER and RIR of our rows compare "
        f"with our test ({MEASURED!r}), those of BackdoorBench's with the attack's figures. Check dataset and preprocessing."
    )


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
    metrics = list(METRICS)
    board = board.rename(columns=names)
    board[metrics] = board[metrics].apply(pd.to_numeric, errors="coerce")
    board = board[board[metrics].ge(0).all(axis=1) & board[metrics].le(1).all(axis=1)]
    board = board.drop_duplicates([*SETTING, "defense"]).assign(origin="published", source=str(path), record="")
    attacked = board[board["defense"] == BASELINE].set_index(SETTING)[metrics]
    before = board[SETTING].join(attacked, on=SETTING)[metrics]
    compared = before.notna().all(axis=1) & (board["defense"] != BASELINE)
    both = zip(before[compared].to_dict("records"), board[compared].to_dict("records"), strict=True)
    rated = pd.DataFrame([ratings(b, a) for b, a in both], index=board.index[compared])
    board = board.join(rated)
    board["method"] = board["defense"] + " (published)"
    return board.reindex(columns=COLUMNS).astype(dict.fromkeys(WHOLE_NUMBERS, "Int64")).reset_index(drop=True)


def join_leaderboard(frame: pd.DataFrame, board: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the published rows that have a dataset, model, attack and poison rate of one of its records."""
    ours = {tuple(row) for row in frame[SETTING].dropna().itertuples(index=False)}
    shared = [tuple(row) in ours for row in board[SETTING].itertuples(index=False)]
    return pd.concat([frame, board[shared]], ignore_index=True) if any(shared) else frame
