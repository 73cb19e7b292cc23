"""A folder in which BackdoorBench's scripts find a record, a dataset and BackdoorBench itself, wherever these lie.

BackdoorBench reads ``./record``, ``./config`` and the poisoned images' paths from the current folder, and takes the dataset
from beside the record's real path (``utils/save_load_attack.py``). A temporary folder of links satisfies it, so that neither
the checkout nor the record has to be moved or changed; only ``record/<name>/defense`` is written through.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fmp_core.backdoorbench.process import in_own_process
from fmp_core.errors import UserError
from fmp_core.storage.files import make_folders

DATASET_CODE = "utils/aggregate_block/dataset_and_transform_generate.py"
LANDMARKS = ("defense/base.py", DATASET_CODE, "config/defense")
OURS = (".git", "record", "data", "record_scripts")  # not linked into the workspace
ATTACK_FILE = "attack_result.pt"  # as in data/attack_record.py, which imports torch


def find_checkout(path: str | Path) -> Path:
    """The root of a BackdoorBench checkout. Raises UserError if ``path`` is none."""
    root = Path(path).resolve()
    missing = next((name for name in LANDMARKS if not (root / name).exists()), None)
    if missing is not None:
        raise UserError(f"{path} is not a BackdoorBench checkout, because it has no {missing}; clone it and name its root.")
    return root


@dataclass(frozen=True)
class Job:
    """What a script of BackdoorBench is to work on: facts of a record that was read safely, and where things lie.

    ``data_path`` and ``image_folders`` are as stored in the record; ``image_size`` is (height, width, channels).
    """

    checkout: Path
    folder: Path
    name: str
    dataset: str
    model_name: str
    num_classes: int
    image_size: tuple[int, int, int]
    data_path: str
    image_folders: tuple[PurePosixPath, ...]
    dataset_path: Path
    dataset_folder: Path  # below it; its name may be another that means the dataset
    device: str

    @property
    def flags(self) -> list[str]:
        """What every script of BackdoorBench is told of the record."""
        return ["--dataset", self.dataset, "--model", self.model_name, "--device", self.device]


def add_job_flags(parser: ArgumentParser, around: Path) -> None:
    """Flags that name what :func:`open_job` needs, and BackdoorBench's Python; the checkout may be ``around`` the script."""
    parser.add_argument("--backdoorbench", metavar="DIR", default=str(around), help="a checkout (default: around this script)")
    parser.add_argument("--result_file", metavar="RECORD", required=True, help="the record: a folder below --record_root")
    parser.add_argument("--record_root", metavar="DIR", default="./record", help="default: ./record")
    parser.add_argument("--dataset_path", metavar="DIR", default="./data", help="default: ./data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 ... (default: auto)")
    parser.add_argument("--python", metavar="PROGRAM", default=sys.executable, help="runs BackdoorBench (default: this one)")


def job_of(args: Namespace) -> Job:
    """:func:`open_job` for those flags, in a process of its own."""
    return in_own_process(open_job, args.backdoorbench, args.record_root, args.result_file, args.dataset_path, args.device)


def open_job(checkout: str | Path, record_root: str | Path, name: str, dataset_path: str | Path, device: str = "auto") -> Job:
    """Check everything BackdoorBench is going to need. It executes whatever a record's pickle says; a record that holds more
    than data is refused here, before BackdoorBench sees it. Imports torch, so better called ``in_own_process``.

    Raises UserError if the record or the dataset is missing, damaged or refused, or BackdoorBench does not know it.
    """
    from fmp_core.data.attack_record import read_attack_record
    from fmp_core.data.datasets import dataset_facts, dataset_folder, open_split
    from fmp_core.storage.torch_file import load_torch_file
    from fmp_core.system.devices import choose_device

    root = find_checkout(checkout)
    record = read_attack_record(Path(record_root) / name)
    path = PurePosixPath(name)
    name = record.folder.resolve().name if path.is_absolute() or ".." in path.parts else path.as_posix()
    if not record.bd_test:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: it holds no triggered test images, which its defenses are tested on."
        )
    code = (root / DATASET_CODE).read_text(encoding="utf-8", errors="replace")
    known = set(re.findall(r"""dataset_name == ["'](\w+)["']""", code))  # also of a fork with datasets of its own
    if record.dataset not in known:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: its dataset is {record.dataset}, and BackdoorBench knows "
            f"{', '.join(sorted(known))}. Make a record it can read: python record_scripts/make_record.py --dataset cifar10 "
            "--limit_train 2000 (CIFAR-10 below --dataset_path)."
        )
    for train in (True, False):
        open_split(dataset_path, record.dataset, train, dataset_facts(record.dataset, record.image_size).size)
    state = load_torch_file(record.folder / ATTACK_FILE, known_only=True)  # BackdoorBench would run an unknown class
    try:
        folders = [_image_folder(state[part]) for part in ("bd_train", "bd_test")]
        facts = record.dataset, record.model_name, record.num_classes, record.image_size, str(state["data_path"])
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: its bd_train, bd_test or data_path is not as "
            f"BackdoorBench writes them ({type(error).__name__}: {error}); make the record again."
        ) from None
    chosen = choose_device(device)
    device = str(chosen.device) if device == "auto" else device
    places = (Path(dataset_path).resolve(), dataset_folder(Path(dataset_path), record.dataset).resolve())
    return Job(root, record.folder, name, *facts, tuple(filter(None, folders)), *places, device)


@contextmanager
def workspace(job: Job, write_through: bool = True) -> Iterator[Path]:
    """Yield a temporary current folder for BackdoorBench's scripts; without ``write_through`` their results vanish with it.

    Raises UserError if the temporary folder's path or the record's stored paths are such that BackdoorBench cannot work.
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
        real, seen = job.folder.resolve(), folder / "record" / job.name
        if write_through:
            make_folders(real / "defense")
        seen.mkdir(parents=True)
        for entry in real.iterdir():
            if entry.name == ATTACK_FILE:  # a symbolic link would lead BackdoorBench to look for data/ beside the real record
                try:
                    os.link(entry.resolve(), seen / entry.name)  # link() does not follow links
                except OSError:  # another file system
                    shutil.copyfile(entry, seen / entry.name)
            elif entry.name != "defense" or write_through:
                (seen / entry.name).symlink_to(entry)
        for stored in job.image_folders:
            if not stored.is_absolute() and (real / stored.name).is_dir():
                _link(folder, stored, real / stored.name)
        if "data" not in job.data_path:
            raise UserError(
                f"The record's data_path {job.data_path!r} has no 'data' in it, so BackdoorBench cannot find the "
                f"dataset; it is usually ./data/{job.dataset_folder.name}."
            )
        place = PurePosixPath(job.data_path[job.data_path.index("data") :])  # what BackdoorBench keeps of it
        _link(folder, place, job.dataset_folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _image_folder(state: Any) -> PurePosixPath | None:
    """Where a record says its images lie, e.g. ``record/badnet/bd_test_dataset``; None if it holds them itself."""
    items = state["bd_data_container"]["data_dict"] if isinstance(state, Mapping) and "bd_data_container" in state else {}
    first = next(iter(items.values()), None)
    return PurePosixPath(first["path"]).parent.parent if isinstance(first, Mapping) else None


def _link(folder: Path, place: PurePosixPath, target: Path) -> None:
    link = folder / place
    if link.exists():
        return
    try:
        if ".." in place.parts or not link.parent.resolve().is_relative_to(folder):
            raise OSError
        link.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise UserError(
            f"BackdoorBench would look for {target} at {place}, where no link can be made; check the record's paths."
        ) from None
    link.symlink_to(target)
