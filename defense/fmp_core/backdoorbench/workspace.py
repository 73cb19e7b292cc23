"""A folder in which BackdoorBench's scripts find a record, a dataset and BackdoorBench itself, wherever these lie.

BackdoorBench reads ``./record``, ``./config`` and the poisoned images' paths from the current folder, and takes the dataset
from beside the record's real path (``utils/save_load_attack.py``). A temporary folder of links satisfies it, so that neither
the checkout nor the record has to be moved or changed; only ``record/<name>/defense`` is written through.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fmp_core.data.attack_record import ATTACK_FILE, AttackRecord, read_attack_record
from fmp_core.data.datasets import dataset_facts, open_split
from fmp_core.errors import UserError
from fmp_core.storage.files import make_folders
from fmp_core.storage.torch_file import load_torch_file

SHIMS = Path(__file__).resolve().with_name("shims.py")
LANDMARKS = ("defense/base.py", "utils/save_load_attack.py", "config/defense")
OURS = (".git", "record", "data", "record_scripts")  # not linked into the workspace


def find_checkout(path: str | Path) -> Path:
    """The root of a BackdoorBench checkout.

    Raises:
        UserError: ``path`` is none.
    """
    root = Path(path).resolve()
    missing = next((name for name in LANDMARKS if not (root / name).exists()), None)
    if missing is not None:
        raise UserError(f"{path} is not a BackdoorBench checkout, because it has no {missing}; clone it and name its root.")
    return root


@dataclass(frozen=True)
class Job:
    """What a script of BackdoorBench is to work on. ``state`` is the content of the record's file, safely read."""

    checkout: Path
    record: AttackRecord
    state: Mapping[str, Any]
    dataset_path: Path
    name: str


def open_job(checkout: str | Path, record_root: str | Path, name: str, dataset_path: str | Path) -> Job:
    """Check everything BackdoorBench is going to need. It executes whatever a record's pickle says; a record that holds more
    than data is refused here, before BackdoorBench sees it.

    Raises:
        UserError: no checkout, or the record or the dataset is missing, damaged or refused.
    """
    root = find_checkout(checkout)
    record = read_attack_record(Path(record_root) / name)
    for train in (True, False):
        open_split(dataset_path, record.dataset, train, dataset_facts(record.dataset, record.image_size).size)
    return Job(root, record, load_torch_file(record.folder / ATTACK_FILE), Path(dataset_path).resolve(), name)


@contextmanager
def workspace(job: Job, write_through: bool = True) -> Iterator[Path]:
    """Yield a temporary current folder for BackdoorBench's scripts; without ``write_through`` their results vanish with it.

    Raises:
        UserError: the temporary folder's path or the record's stored paths are such that BackdoorBench cannot work.
    """
    folder = Path(tempfile.mkdtemp(prefix="fmp_bb_")).resolve()
    try:
        if "record" in str(folder):
            raise UserError(
                f"BackdoorBench misreads paths with 'record' in them, such as {folder}; set TMPDIR to another folder."
            )
        for entry in job.checkout.iterdir():
            if entry.name not in OURS:
                (folder / entry.name).symlink_to(entry)
        _lay_out_record(job, folder, write_through)
        _link(folder, _dataset_place(job.state["data_path"]), job.dataset_path / job.record.dataset)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lay_out_record(job: Job, folder: Path, write_through: bool) -> None:
    real, seen = job.record.folder.resolve(), folder / "record" / job.name
    if write_through:
        make_folders(real / "defense")
    seen.mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name == ATTACK_FILE:
            _duplicate(entry, seen / entry.name)  # a link would lead BackdoorBench to look for data/ beside the real record
        elif entry.name != "defense" or write_through:
            (seen / entry.name).symlink_to(entry)
    for part in ("bd_train", "bd_test"):
        stored = _image_folder(job.state[part])
        if stored is not None and not stored.is_absolute() and (real / stored.name).is_dir():
            _link(folder, stored, real / stored.name)


def _duplicate(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _image_folder(state: Any) -> PurePosixPath | None:
    """Where a record says its images lie, e.g. ``record/badnet/bd_test_dataset``; None if it holds them itself."""
    items = state["bd_data_container"]["data_dict"] if isinstance(state, Mapping) and "bd_data_container" in state else {}
    first = next(iter(items.values()), None)
    return PurePosixPath(first["path"]).parent.parent if isinstance(first, Mapping) else None


def _dataset_place(stored: str) -> PurePosixPath:
    """BackdoorBench keeps of the stored path what follows its first ``data``."""
    if "data" not in stored:
        raise UserError(f"The record's data_path {stored!r} has no 'data' in it, so BackdoorBench cannot find the dataset.")
    return PurePosixPath(stored[stored.index("data") :])


def _link(folder: Path, place: PurePosixPath, target: Path) -> None:
    link = folder / place
    if link.exists():
        return
    if ".." in place.parts or not link.parent.resolve().is_relative_to(folder) or not _makes_parents(link):
        raise UserError(f"BackdoorBench would look for {target} at {place}, where nothing can be put.")
    link.symlink_to(target)


def _makes_parents(link: Path) -> bool:
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Ended:
    """How a script ended: its exit code, wall-clock seconds, and the last line that reads like an error."""

    code: int
    seconds: float
    last_error: str


def run_script(
    folder: Path, script: str, arguments: Sequence[str], *, device: str, python: str, log: Path, echo: bool = True
) -> Ended:
    """Run ``script`` (relative to the checkout) in workspace ``folder``; everything it prints goes to ``log`` as it comes.

    ``device`` cpu hides all GPUs from it, because some scripts use one whatever ``--device`` says.

    Raises:
        UserError: ``python`` is no program.
    """
    program = shutil.which(python)
    if program is None:
        raise UserError(f"--python {python} is not a program; name the Python that BackdoorBench runs on.")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    environment.pop("PYTHONPATH", None)  # ours would shadow BackdoorBench's modules
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [os.path.abspath(program), str(SHIMS), script, *arguments]
    started, last_error = time.monotonic(), ""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if echo:
                    print(line, end="", flush=True)
                if _reads_like_an_error(line):
                    last_error = line.strip()
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = time.monotonic() - started
        file.write(f"\nexit code {code} after {seconds:.0f} s\n")
    return Ended(code, seconds, last_error)


def _reads_like_an_error(line: str) -> bool:
    """The last line of a traceback, or what argparse prints: ``SomeError: ...``, ``ft.py: error: ...``."""
    return ": error: " in line or re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line) is not None
