"""A folder in which BackdoorBench's scripts find a record, a dataset and BackdoorBench itself, wherever these lie.

BackdoorBench reads ``./record``, ``./config`` and the poisoned images' paths from the current folder, and takes the dataset
from beside the record's real path (``utils/save_load_attack.py``). A temporary folder of links satisfies it, with a copy of
``attack_result.pt`` that we write and links to the images it names, so that neither the checkout nor the record has to be moved
or changed; only ``record/<name>/defense`` is written through. For an analysis the defense's result is a copy, too, and only its
folder of plots is written through.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fmp_core.backdoorbench.process import in_own_process
from fmp_core.data.names import ATTACK_FILE, DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.storage.files import make_folders

DATASET_CODE = "utils/aggregate_block/dataset_and_transform_generate.py"
LANDMARKS = ("defense/base.py", DATASET_CODE, "config/defense")
OURS = (".git", "record", "data", "record_scripts")  # not linked into the workspace
MODEL_CODE = "utils/aggregate_block/model_trainer_generate.py"
CELEBA = ("list_attr_celeba", "list_eval_partition", "identity_CelebA", "list_bbox_celeba", "list_landmarks_align_celeba")
LAYOUTS = {  # what BackdoorBench reads of a dataset; FMP reads other layouts, too
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "gtsrb": ("Train/00000/GT-00000.csv", "Test/GT-final_test.csv"),
    "mnist": ("MNIST/raw",),
    "celeba": ("celeba/img_align_celeba", *(f"celeba/{name}.txt" for name in CELEBA)),
    "imagenet": ("train", "val"),
    "tiny": ("tiny-imagenet-200/train", "tiny-imagenet-200/val"),
}
PLOTS = "visual"  # the folder in that of a defense into which BackdoorBench's analyses write


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

    ``image_size`` is (height, width, channels); ``digest`` the SHA-256 of the record's ``attack_result.pt``; ``gpus`` what
    ``CUDA_VISIBLE_DEVICES`` is to be for BackdoorBench, None to leave it: some scripts use the first GPU that they see,
    whatever ``--device`` says.
    """

    checkout: Path
    folder: Path
    name: str
    dataset: str
    model_name: str
    num_classes: int
    image_size: tuple[int, int, int]
    digest: str
    dataset_path: Path
    dataset_folder: Path  # below it; its name may be another that means the dataset
    device: str
    gpus: str | None = None

    @property
    def device_there(self) -> str:
        """``device`` by the numbers that GPUs have for BackdoorBench, which sees ``gpus`` only."""
        return f"cuda:{','.join(map(str, range(self.gpus.count(',') + 1)))}" if self.gpus else self.device

    @property
    def flags(self) -> list[str]:
        """What every script of BackdoorBench is told of the record."""
        return ["--dataset", self.dataset, "--model", self.model_name, "--device", self.device_there]


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
    """Check everything BackdoorBench is going to need. Imports torch, so better called ``in_own_process``.

    Raises UserError if the record or the dataset is missing, damaged or refused, or BackdoorBench does not know it.
    """
    from fmp_core.data.attack_record import read_attack_record
    from fmp_core.data.datasets import dataset_facts, dataset_folder, open_split
    from fmp_core.system.devices import choose_device, visible_gpus

    root = find_checkout(checkout)
    record = read_attack_record(Path(record_root) / name)
    path = PurePosixPath(name)
    name = record.folder.resolve().name if path.is_absolute() or ".." in path.parts else path.as_posix()
    if not record.bd_test:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: it holds no triggered test images, which its defenses are tested on."
        )
    _refuse_unknown(root, name, record.dataset, record.model_name)
    size = dataset_facts(record.dataset, record.image_size).size
    if record.image_size != size:
        shown, usual = ("x".join(map(str, sides[:2])) for sides in (record.image_size, size))
        raise UserError(
            f"BackdoorBench cannot use the record {name}: its images are {shown}, and BackdoorBench's defenses take all of "
            f"{record.dataset} as {usual}."
        )
    for train in (True, False):
        open_split(dataset_path, record.dataset, train, size)
    data = dataset_folder(Path(dataset_path), record.dataset)
    _refuse_layout(record.dataset, data)
    facts = record.dataset, record.model_name, record.num_classes, record.image_size, record.digest
    chosen = choose_device(device)
    device = str(chosen.device) if device == "auto" else device
    gpus = ",".join(visible_gpus()[number] for number in chosen.device_ids) or None if device != "cpu" else ""
    return Job(root, record.folder, name, *facts, Path(dataset_path).resolve(), data.resolve(), device, gpus)


def _refuse_unknown(checkout: Path, name: str, dataset: str, model: str) -> None:
    """Raises UserError if the checkout, perhaps a fork with datasets and models of its own, does not know one of these."""

    def named(file: str, variable: str) -> set[str]:
        path = checkout / file
        code = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return set(re.findall(rf"""{variable} == ["'](\w+)["']""", code))

    datasets, models = named(DATASET_CODE, "dataset_name"), named(MODEL_CODE, "model_name")
    if dataset not in datasets:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: its dataset is {dataset}, and BackdoorBench knows "
            f"{', '.join(sorted(datasets))}. Make a record it can read: python record_scripts/make_record.py --dataset cifar10 "
            "--limit_train 2000 (CIFAR-10 below --dataset_path)."
        )
    if models and model not in models:
        raise UserError(
            f"BackdoorBench cannot use the record {name}: its model is {model}, and BackdoorBench knows "
            f"{', '.join(sorted(models))}."
        )


def _refuse_layout(dataset: str, folder: Path) -> None:
    """Raises UserError if BackdoorBench does not read a known dataset as it lies in ``folder``.

    It makes folders where it finds none, and takes the unsorted validation images of Tiny ImageNet for one class.
    """
    unsorted = folder / "tiny-imagenet-200" / "val" / "images"
    if dataset == "tiny" and unsorted.is_dir():
        raise UserError(
            f"BackdoorBench reads the validation images of tiny as val/<class>/*, but {unsorted} has them unsorted; sort them "
            "by val_annotations.txt, as BackdoorBench's download does."
        )
    absent = next((name for name in LAYOUTS.get(dataset, ()) if not (folder / name).exists()), None)
    if absent:
        raise UserError(
            f"BackdoorBench reads {dataset} from {absent}, which {folder} does not have; lay it out so, or link it."
        )


@contextmanager
def workspace(job: Job, write_through: bool = True, analysed: str | None = None) -> Iterator[Path]:
    """Yield a temporary current folder for BackdoorBench's scripts; without ``write_through`` their results vanish with it.

    With ``analysed`` they are given that defense's result.

    Raises UserError if the temporary folder's path is such that BackdoorBench cannot work, the record holds no poisoned sets in
    its form, or that result is not plain data.
    """
    top = Path(tempfile.mkdtemp(prefix="fmp_bb_")).resolve()
    folder = top / "up" / "here"  # its scripts import from ../ and ../../ too, which must not be where anybody may write
    try:
        folder.mkdir(parents=True)
        if "record" in str(folder):
            raise UserError(
                f"BackdoorBench misreads paths with 'record' in them, such as {folder}; set TMPDIR to another folder."
            )
        for entry in job.checkout.iterdir():
            if entry.name not in OURS:
                (folder / entry.name).symlink_to(entry)
        real, seen = job.folder.resolve(), folder / "record" / job.name
        through = write_through and not analysed
        if through:
            make_folders(real / "defense")
        seen.mkdir(parents=True)
        images = in_own_process(_write_record, job, seen / ATTACK_FILE)
        for name in {*images, "defense"} if through else images:
            (seen / name).symlink_to(real / name)
        if analysed:
            _offer_result(real / "defense" / analysed, seen / "defense" / analysed, write_through)
        (folder / "data").mkdir()
        (folder / "data" / job.dataset).symlink_to(job.dataset_folder)
        yield folder
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _offer_result(results: Path, seen: Path, write_through: bool) -> None:
    """Make the folder ``seen`` of the defense that wrote ``results``: with a copy of its model, and perhaps its plots."""
    seen.mkdir(parents=True)
    in_own_process(_write_result, results / DEFENSE_FILE, seen / DEFENSE_FILE)
    if write_through:
        make_folders(results / PLOTS)
        for place in (seen, seen.parents[1]):  # network and quality draw into the record's folder
            (place / PLOTS).symlink_to(results / PLOTS)


def _write_result(result: Path, file: Path) -> None:
    from fmp_core.backdoorbench.record_copy import write_result_copy  # imports torch

    write_result_copy(result, file)


def _write_record(job: Job, file: Path) -> set[str]:
    from fmp_core.backdoorbench.record_copy import write_record_copy  # imports torch

    return write_record_copy(job, file)
