"""All results below a record root as one tidy table, and BackdoorBench's published leaderboard beside it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from fmp_core.data.names import ATTACK_FILE, RECORD_DEPTH
from fmp_core.errors import UserError, in_one_line
from fmp_core.metrics import HEADLINES, METRICS, MetricValues, drop, in_percent, ratings
from fmp_core.results.read import Result, read_attack_metrics, read_record, read_result
from fmp_core.results.titles import printable
from fmp_core.storage.files import file_digest

T = TypeVar("T")
Warn = Callable[[str], None]
BASELINE = "no defense"  # the attacked model; the leaderboard's name for it
MEASURED = f"{BASELINE} (our test)"  # the same, where our figures are not those that the attack logged
POINT = 0.01  # figures of one model that differ by more were not measured alike
SETTING = ["dataset", "model", "attack", "pratio"]
COLUMNS = [
    *("record", "defense", *HEADLINES, "method", "seed", "ratio", "test_images", "seconds", "cpu_seconds", "reused"),
    *(*SETTING, "record_seed", "record_digest", "settings_digest", "code", "origin", "baseline", "acc_lost", "source"),
    *("target", "detector", "detection_score", "flagged", "named"),
]


def collect(root: str | Path, warn: Warn) -> pd.DataFrame:
    """One row per ``<record>/defense/*`` and one ``no defense`` row per record; metrics are fractions in [0,1].

    ``record`` is the path below ``root``. ``origin`` is ``ours``, ``backdoorbench`` or ``attack`` (the attacked model).
    ``method`` is ``defense`` without the seed, so rows that differ only in seeds share it. ``baseline`` says whose test of the
    attacked model DER and RIR compare with: ``attack`` (what the attack logged) or ``our test``; ``acc_lost`` is the accuracy
    lost since that test. ``ratio`` is the share of clean data the defense had, ``test_images`` the size of the sample where it
    was not tested on all, ``seconds`` is elapsed time, ``cpu_seconds`` that of all its threads and processes, ``reused`` names
    stages that they do not wholly contain, since an earlier run did all or a part of them, ``code`` the commit of this project.
    ``target`` is the attack's; ``detector`` to ``named`` are what the defense says about the attacked model
    (:class:`~fmp_core.results.detection.Detection`). ``warn`` gets one line for every file that could not be read, every record
    that is met twice, and where two tests of the attacked model contradict each other.

    Raises UserError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; name the folder that holds the attack records.")
    records = _named(root, _record_folders(root, warn))
    return _tidy([row for name, folder in records for row in _record_rows(name, folder, warn)])


def _named(root: Path, folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """The records and their paths below ``root``; of several that look the same in print, the later ones get a number."""
    seen: Counter[str] = Counter()
    for folder in folders:
        name = str(_unicode(folder.resolve().name if folder == root else folder.relative_to(root).as_posix()))
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", folder


def _tidy(rows: list[dict[Any, Any]]) -> pd.DataFrame:
    whole = dict.fromkeys(("seed", "test_images", "record_seed"), "Int64")
    texts = [{key: _unicode(value) for key, value in row.items()} for row in rows]
    return pd.DataFrame(texts, columns=COLUMNS).astype({**whole, **dict.fromkeys(HEADLINES, "float64"), "flagged": "boolean"})


def _unicode(value: Any) -> Any:
    """Names of files need not be Unicode, and may break a line of csv; what is written into tables must not."""
    return printable(value.encode("utf-8", "backslashreplace").decode()) if isinstance(value, str) else value


def _record_folders(root: Path, warn: Warn) -> list[Path]:
    """The folders below ``root``, up to ``RECORD_DEPTH`` levels, that hold a folder ``defense``; no record is searched.

    ``root`` itself, if it is a record. Of links to one record, and itself, it is one.
    """
    if (root / ATTACK_FILE).is_file() and (root / "defense").is_dir():
        return [root]
    found: dict[Path, Path] = {}
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        is_record = folder != root and (ATTACK_FILE in files or ("defense" in folders and not _is_code(folder / "defense")))
        if is_record and "defense" in folders:
            real = folder.resolve()
            if real in found:
                warn(f"{folder} and {found[real]} are one record; it is counted once")
            if real not in found or real == root.resolve() / folder.relative_to(root):
                found[real] = folder
        deepest = is_record or len(folder.relative_to(root).parts) == RECORD_DEPTH  # links may form a ring
        folders[:] = sorted(name for name in folders if not deepest and not name.startswith("."))
    return list(found.values())


def _is_code(folder: Path) -> bool:
    """Whether a folder ``defense`` is that of a checkout, or of its ``config`` or ``utils``, and no record's."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.py", "*/*.py", "*/*.yaml"))


def _record_rows(record: str, folder: Path, warn: Warn) -> Iterator[dict[str, Any]]:
    logged = _or_warn(read_attack_metrics, folder, warn) or {}
    about: dict[str, Any] = {"record": record, "source": str(folder)}
    about |= _or_warn(read_record, folder, warn) or {}
    places = sorted(path for path in (folder / "defense").iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {place.name: _or_warn(_result_in, place, warn) for place in places}
    results = {name: result for name, result in found.items() if result}
    for name in sorted({BASELINE, MEASURED} & results.keys()):
        warn(f"{folder / 'defense' / name} has the name that the attacked model has in tables; rename the folder")
        del results[name]
    for aside in sorted(path for path in (folder / "defense").glob(".*") if path.suffix in (".before", ".aside")):
        by = "run_defense.py" if aside.suffix == ".before" else "sweep"
        warn(f"{aside} is an earlier result; a {by} that runs or was killed put it aside, and another brings it back")
    for name in _of_another(folder, results):
        warn(f"{folder / 'defense' / name} is a result on another attack_result.pt than {folder} has now; run it again")
        del results[name]
    for key in ("dataset", "model"):
        about[key] = about.get(key) or next(filter(None, (getattr(result, key) for result in results.values())), None)
    tests = {name: result.before for name, result in results.items() if result.before and not result.test_images}
    tested: MetricValues = next(iter(tests.values()), {})
    if logged or tested:
        yield {**about, "defense": BASELINE, "method": BASELINE, **(logged or tested), "origin": "attack"}
    differing: dict[tuple[tuple[str, float | None], ...], list[str]] = {}  # other figures of the attacked model -> whose
    for name, before in tests.items():
        if _contradicts(logged or tested, before):
            differing.setdefault(tuple(before.items()), []).append(name)
    others = "the attack logged" if logged else "another run of ours measured"
    for figures, named in differing.items():
        ours, label = dict(figures), MEASURED if len(differing) == 1 else f"{BASELINE} (our test, {named[0]})"
        yield {**about, "defense": label, "method": label, **ours, "origin": "attack"}
        warn(
            f"{about['record']}: {others} {in_percent(logged or tested)} for its model, our test gave {in_percent(ours)} "
            f"({', '.join(named)}); DER and RIR of these rows compare with their own test ({label!r}), those of the "
            "others do not. Check dataset and preprocessing."
        )
    own = {name for named in differing.values() for name in named}
    for defense, result in results.items():
        own_test = bool(result.before) and (not logged or bool(result.test_images) or defense in own)
        before = result.before if own_test else logged or tested
        row = {**about, "defense": defense, **result.metrics, **(ratings(before, result.metrics) if before else {})}
        row |= {"method": result.method or re.sub(rf"-s{result.seed}$", "", defense), "seed": result.seed}
        row |= {"ratio": result.ratio, "test_images": result.test_images, "source": result.source}
        row |= {"settings_digest": result.settings_digest, "code": result.code}
        row |= {"seconds": result.seconds, "cpu_seconds": result.cpu_seconds, "reused": result.reused}
        row |= {"origin": "ours" if result.ours else "backdoorbench"}
        row |= result.detection.as_row() if result.detection else {}
        row |= {"acc_lost": drop(before["test_acc"], result.metrics["test_acc"])} if before else {}
        yield row | {"baseline": None if not before else "attack" if before is logged else "our test"}


def _or_warn(read: Callable[[Path], T], folder: Path, warn: Warn) -> T | None:
    try:
        return read(folder)
    except (UserError, OSError) as problem:
        warn(str(problem))
        return None


def _of_another(folder: Path, results: Mapping[str, Result]) -> list[str]:
    """Names of the results that are of another attacked model than the record holds now, as far as they say."""
    attacked, noted = (
        folder / ATTACK_FILE,
        {name: of for name, result in results.items() if (of := result.attack_result)},
    )
    if not noted or not attacked.is_file():
        return []
    today = file_digest(attacked)  # once: the file is large
    return [name for name, digest in noted.items() if digest != today]


def _result_in(folder: Path) -> Result | None:
    """None of a folder that holds nothing, or scores kept for siblings: nothing was run under its name."""
    return None if {path.name for path in folder.iterdir()} <= {"cache"} else read_result(folder)


def _contradicts(logged: MetricValues, tested: MetricValues) -> bool:
    """Whether two tests of one model, METRICS in [0,1] or nothing, differ by more than a point."""
    pairs = [(logged[name], tested[name]) for name in METRICS] if logged and tested else []
    return any(there is not None and here is not None and abs(there - here) > POINT for there, here in pairs)


def read_leaderboard(path: str | Path) -> pd.DataFrame:
    """BackdoorBench's leaderboard csv in our columns, origin ``published``; runs that failed there (-1, empty) are left out."""
    try:
        board = pd.read_csv(path, keep_default_na=False, na_values=[""])  # "None" may be a defense's name
    except OSError as error:
        raise UserError(f"--leaderboard {path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"--leaderboard {path} cannot be read as csv ({in_one_line(error, 120)}).") from None
    names = {"backbone": "model", "attack_name": "attack", "defense_name": "defense", "ratio": "pratio"}
    if absent := [name for name in ("dataset", *names, *METRICS) if name not in board]:
        raise UserError(f"--leaderboard {path} lacks the columns {', '.join(absent)}; it is not BackdoorBench's leaderboard.")
    metrics = list(METRICS)
    board = board[["dataset", *names, *METRICS]].rename(columns=names)
    board[[*metrics, "pratio"]] = board[[*metrics, "pratio"]].apply(pd.to_numeric, errors="coerce")
    board = board.dropna(subset=[*SETTING, "defense"]).astype({"defense": str})
    board = board[board[metrics].ge(0).all(axis=1) & board[metrics].le(1).all(axis=1)]
    board = board.drop_duplicates([*SETTING, "defense"]).assign(origin="published", source=str(path), record="")
    rows = board.assign(method=board["defense"] + " (published)").to_dict("records")
    attacked = {tuple(row[key] for key in SETTING): row for row in rows if row["defense"] == BASELINE}
    for row in rows:
        before = attacked.get(tuple(row[key] for key in SETTING))
        row |= ratings(before, row) if before and before is not row else {}
    return _tidy(rows)


def join_leaderboard(frame: pd.DataFrame, board: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the published rows that have a dataset, model, attack and poison rate of one of its records.

    All-to-all records do not count: the leaderboard's attacks are all-to-one.
    """
    ours = set(frame.loc[frame["target"].ne("all-to-all"), SETTING].dropna().itertuples(index=False, name=None))
    shared = [row in ours for row in board[SETTING].itertuples(index=False, name=None)]
    return pd.concat([frame, board[shared]], ignore_index=True) if any(shared) else frame
