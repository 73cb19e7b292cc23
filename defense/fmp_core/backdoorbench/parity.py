"""Do FMP and a BackdoorBench checkout agree on a record: the same figures, the same images, the same files?

Each reads the record and tests the model in a process of its own: FMP in :func:`measure_with_fmp`, BackdoorBench in
``probe.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fmp_core.backdoorbench.process import in_own_process, run_script
from fmp_core.backdoorbench.workspace import Job, workspace
from fmp_core.data.names import DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.metrics import METRICS
from fmp_core.results.values import read_json

PROBE = Path(__file__).resolve().with_name("probe.py")
LOSSES = ("clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch")
LOSS_TOLERANCE = 1e-4  # relative; batches of another size and memory layout round differently
FT_IMAGES = 256  # clean images of the one epoch of ft.py


class Check(NamedTuple):
    """One line of the table; ``passed`` is None where there was nothing to check."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "skip"}[self.passed]
        return f"{word}  {self.name:<50}{self.detail}"


def check_parity(job: Job, python: str) -> list[Check]:
    """All checks; ``python`` runs BackdoorBench. Prints a line when a stage begins, and every half minute of BackdoorBench's.

    Raises UserError if FMP has not run on the record yet, or one of the two fails on it.
    """
    results = job.folder / "defense" / "fmp"
    if not (results / "metrics.json").is_file():
        raise UserError(f"There is no FMP result in {results}; run python defense/fmp.py --result_file {job.name} first.")
    run = read_json(results / "metrics.json")
    changed = [name for name in ("test_images", "mean", "std") if run.get("settings", {}).get(name) is not None]
    if changed:
        raise UserError(
            f"The FMP result in {results} is of a run with --{changed[0]}, whose figures BackdoorBench cannot repeat; run "
            f"python defense/fmp.py --result_file {job.name} without it first."
        )
    after = run["after"]
    with tempfile.TemporaryDirectory(prefix="fmp_parity_") as temporary:
        scratch = Path(temporary)
        with _stage("1/4", "FMP reads the record and tests its model"):
            ours = in_own_process(measure_with_fmp, job, scratch)
        with _stage("2/4", "BackdoorBench reads the record and tests its model and FMP's"):
            theirs = measure_with_backdoorbench(job, ours["probe"], python, scratch)
        with _stage("3/4", f"BackdoorBench's ft.py, one epoch on {FT_IMAGES} images and its tests"):
            checks = [run_ft(job, theirs["sizes"]["clean_train"], python, scratch)]
        with _stage("4/4", "the files of ft.py and FMP are compared"):
            for suffix in ("df.csv", "df_summary.csv"):
                checks += compare_tables(scratch / f"ft_{suffix}", results / f"fmp_{suffix}")
            checks.append(compare_results(scratch / DEFENSE_FILE, results / DEFENSE_FILE))
            checks.append(check_class(job))
    sizes = ", ".join(f"{key} {value}" for key, value in theirs["sizes"].items())
    return [
        Check("load_attack_result reads the record", True, sizes),
        *compare_figures("attacked model", theirs["attacked"], ours["attacked"]),
        *compare_figures(DEFENSE_FILE, theirs["defended"], after),
        *compare_data(theirs["data"], ours["data"]),
        *checks,
    ]


@contextmanager
def _stage(number: str, what: str) -> Iterator[None]:
    print(f"[{number}] {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"      {time.monotonic() - started:.0f} s", flush=True)


def measure_with_fmp(job: Job, scratch: Path) -> dict[str, Any]:
    """What FMP makes of the record with its default settings, and what BackdoorBench is to measure. Imports torch."""
    from fmp_core.data.clean_subset import choose_subset
    from fmp_core.inputs import load_inputs
    from fmp_core.models.evaluate import evaluate
    from fmp_core.settings import load_settings
    from fmp_core.system.devices import choose_device

    folder = job.folder.resolve()  # which may have another name than the record is called by
    settings = load_settings({"record_root": str(folder.parent), "dataset_path": str(job.dataset_path)})
    inputs = load_inputs(settings, folder.name, choose_device(job.device).device)
    indexed = sorted(inputs.subset)[::-1]  # a subset in an order that no seed gives
    index = scratch / "index.txt"
    index.write_text("".join(f"{i}\n" for i in indexed))
    test, defender = inputs.test, inputs.defender
    return {
        "probe": {
            "result_file": job.name,
            "dataset": job.dataset,
            "num_classes": job.num_classes,
            "size": job.image_size[:2],
            "device": job.device_there,
            "batch_size": settings.batch_size,
            "seed": settings.random_seed,
            "ratio": settings.ratio,
            "index": str(index),
        },
        "data": {
            "clean subset of the seed": inputs.subset,
            "clean subset of --index": choose_subset(max(indexed) + 1, settings.ratio, settings.random_seed, str(index)),
            "clean subset: labels": defender.labels.tolist(),
            "clean subset: pixels": _sha256(defender.images),
            "poisoned test set: attack labels": test.targets.tolist(),
            "poisoned test set: true labels": test.originals.tolist(),
            "poisoned test set: pixels": _sha256(test.poisoned_images),
        },
        "attacked": asdict(evaluate(defender.model, test, settings.batch_size).metrics),
    }


def _sha256(images: Any) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def measure_with_backdoorbench(job: Job, inputs: dict[str, Any], python: str, scratch: Path) -> dict[str, Any]:
    """Run the probe; its measurements. Raises UserError, with BackdoorBench's last error, if it fails."""
    (scratch / "inputs.json").write_text(json.dumps(inputs))
    files = [str(scratch / "inputs.json"), str(scratch / "measured.json")]
    with workspace(job, write_through=False, analysed="fmp") as folder:
        (folder / PROBE.name).symlink_to(PROBE)
        log = scratch / "probe.log"
        ended = run_script(folder, PROBE.name, files, gpus=job.gpus, python=python, log=log, echo=False)
    if ended.code:
        raise UserError(f"BackdoorBench cannot read this record or FMP's result: {ended}.")
    return dict(json.loads((scratch / "measured.json").read_text()))


def run_ft(job: Job, clean_images: int, python: str, scratch: Path) -> Check:
    """One epoch of BackdoorBench's ft.py on the record; its results go to ``scratch`` and the record is left alone."""
    ratio = f"{min(1.0, FT_IMAGES / clean_images):.6f}"
    flags = [*job.flags, "--result_file", job.name, "--epochs", "1", "--ratio", ratio, "--num_workers", "0"]
    with workspace(job, write_through=False) as folder:
        log = scratch / "ft.log"
        ended = run_script(folder, "defense/ft.py", flags, gpus=job.gpus, python=python, log=log, echo=False)
        for name in ("ft_df.csv", "ft_df_summary.csv", DEFENSE_FILE):
            result = folder / "record" / job.name / "defense" / "ft" / name
            if result.is_file():
                result.replace(scratch / name)
    whole = ended.code == 0 and (scratch / DEFENSE_FILE).is_file()
    return Check("ft.py runs on the record", whole, f"{ended.seconds:.0f} s" if whole else str(ended))


def compare_figures(name: str, theirs: dict[str, float], ours: dict[str, float]) -> list[Check]:
    """Fractions must be equal to the last digit, losses to rounding."""
    checks = []
    for key in (*METRICS, *(loss for loss in LOSSES if loss in ours)):
        form, tolerance = (".7g", LOSS_TOLERANCE * abs(theirs[key])) if key in LOSSES else ("", 0.0)
        detail = f"BackdoorBench {theirs[key]:{form}}  FMP {ours[key]:{form}}"
        checks.append(Check(f"{name}: {key}", abs(theirs[key] - ours[key]) <= tolerance, detail))
    return checks


def compare_data(theirs: dict[str, Any], ours: dict[str, Any]) -> list[Check]:
    """The clean subset, by seed and by file, and the poisoned test images: positions, labels and pixels."""
    checks = []
    for name, value in ours.items():
        detail = "SHA-256 of all" if "pixels" in name else f"{len(value)} {'labels' if 'labels' in name else 'indices'}"
        checks.append(Check(name, theirs[name] == value, detail))
    return checks


def compare_tables(theirs: Path, ours: Path) -> list[Check]:
    """Columns, row labels and the way values are written, of one csv file of BackdoorBench's ft and the same one of FMP."""
    if not theirs.is_file():
        return [Check(f"{ours.name} against {theirs.name}", False, "BackdoorBench's ft wrote none")]
    expected, found = (pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False) for path in (theirs, ours))
    labels = expected.index if "summary" in ours.name else range(len(found))
    rows, alike = [str(label) for label in found.index], list(expected) == list(found)
    checks = [
        Check(f"{ours.name}: columns", alike, ",".join(map(str, found))),
        Check(f"{ours.name}: row labels", rows == [str(label) for label in labels], ",".join(rows)),
    ]
    if alike:
        odd = [column for column in found if not _kinds(found[column]) - {"nothing", "nan_value"} <= _kinds(expected[column])]
        checks.append(
            Check(f"{ours.name}: value formats", not odd, f"unlike in {', '.join(map(str, odd))}" if odd else "alike")
        )
    return checks


def _kinds(column: pd.Series) -> set[str]:
    kinds = {
        "nothing": "",
        "nan_value": "nan_value",
        "whole": r"-?\d+",
        "decimal": r"-?\d+\.\d+(e-?\d+)?|\d+(\.\d+)?e-\d+",
        "truth": "True|False",
    }
    return {next((kind for kind, form in kinds.items() if re.fullmatch(form, value)), f"text {value!r}") for value in column}


def compare_results(theirs: Path, ours: Path) -> Check:
    """``defense_result.pt``: the same keys in the same order, and tensors of the same names, order, shapes and dtypes."""
    from fmp_core.storage.torch_file import load_torch_file  # imports torch; BackdoorBench, which needs the memory, has ended

    name = "defense_result.pt is built as ft's"
    if not theirs.is_file():
        return Check(name, False, "BackdoorBench's ft wrote none")
    contents = [load_torch_file(path) for path in (theirs, ours)]
    tensors = [[(key, value.shape, value.dtype) for key, value in content["model"].items()] for content in contents]
    keys = [list(content) for content in contents]
    return Check(name, keys[0] == keys[1] and tensors[0] == tensors[1], f"{', '.join(keys[1])}; {len(tensors[1])} tensors")


def check_class(job: Job) -> Check:
    """In the checkout, ``FMP`` must derive from BackdoorBench's own class."""
    name = "from defense.fmp import FMP is a BB defense"
    if not (job.checkout / "defense" / "fmp.py").exists():
        return Check(name, None, "FMP is not installed there (record_scripts/install.py)")
    code = "from defense.fmp import FMP; import defense.base as b; print(issubclass(FMP, b.defense), b.__file__)"
    # -B: no compiled files in the checkout. The current folder is the checkout, as it is for BackdoorBench's users.
    ran = subprocess.run([sys.executable, "-B", "-c", code], cwd=job.checkout, capture_output=True, text=True)
    said, _, file = ran.stdout.strip().partition(" ")
    passed = said == "True" and Path(file).resolve().is_relative_to(job.checkout)
    lines = (ran.stdout or ran.stderr).strip().splitlines()
    return Check(name, passed, lines[-1] if lines else f"exit code {ran.returncode}")
