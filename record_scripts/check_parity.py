#!/usr/bin/env python3
"""Check that FMP and your BackdoorBench agree on a record: the same figures, the same images, the same files.

    python defense/fmp.py --result_file badnet_cifar10                 # first: the check reads what FMP wrote
    python record_scripts/check_parity.py --backdoorbench ~/BackdoorBench --result_file badnet_cifar10

BackdoorBench's own code runs in a process of its own (its ``load_attack_result``, ``choose_index``, ``test_current_model``,
and one epoch of its ``ft.py``); no file of it and none of the record is changed. Exit code 0 if all agree, 1 if anything does
not, 2 if the check cannot be made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import pandas as pd
from fmp import FMP
from fmp_core.backdoorbench.workspace import Job, open_job, run_script, workspace
from fmp_core.errors import UserError
from fmp_core.models.evaluate import evaluate
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system.devices import choose_device
from torch import Tensor

PROBE = Path(__file__).resolve().parents[1] / "defense" / "fmp_core" / "backdoorbench" / "probe.py"
ROOT = Path(__file__).absolute().parents[1]
FRACTIONS = ("test_acc", "test_asr", "test_ra")
LOSSES = ("clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch")
LOSS_TOLERANCE = 1e-4  # relative; batches of another size and memory layout round differently
FT_IMAGES = 256  # clean images of the one epoch of ft.py


@dataclass(frozen=True)
class Check:
    """One line of the table; ``passed`` is None where there was nothing to check."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "skip"}[self.passed]
        return f"{word}  {self.name:<50}{self.detail}"


def ask_backdoorbench(job: Job, method: FMP, index: str, device: str, python: str, scratch: Path) -> dict[str, Any]:
    """Run the probe; its answer. Raises UserError, with BackdoorBench's last error, if it does not get to one."""
    question = {
        "result_file": job.name,
        "dataset": job.record.dataset,
        "num_classes": job.record.num_classes,
        "size": job.record.image_size[:2],
        "device": device,
        "batch_size": method.settings.batch_size,
        "seed": method.settings.random_seed,
        "ratio": method.settings.ratio,
        "index": index,
    }
    (scratch / "question.json").write_text(json.dumps(question))
    files = [str(scratch / "question.json"), str(scratch / "answer.json")]
    with workspace(job) as folder:
        (folder / PROBE.name).symlink_to(PROBE)
        ended = run_script(folder, PROBE.name, files, device=device, python=python, log=scratch / "probe.log", echo=False)
    if ended.code:
        tail = " ".join((scratch / "probe.log").read_text(encoding="utf-8").split()[-40:])
        raise UserError(f"BackdoorBench cannot read this record or FMP's result: {ended.last_error or tail}.")
    return dict(json.loads((scratch / "answer.json").read_text()))


def run_ft(job: Job, clean_images: int, device: str, python: str, scratch: Path) -> Check:
    """One epoch of BackdoorBench's ft.py on the record; its results go to ``scratch`` and the record is left alone."""
    share = min(1.0, FT_IMAGES / clean_images)
    record = {"--dataset": job.record.dataset, "--model": job.record.model_name, "--result_file": job.name, "--device": device}
    flags = {**record, "--epochs": "1", "--ratio": f"{share:.6f}", "--num_workers": "0"}
    arguments = [part for pair in flags.items() for part in pair]
    with workspace(job, write_through=False) as folder:
        ended = run_script(folder, "defense/ft.py", arguments, device=device, python=python, log=scratch / "ft.log", echo=False)
        results = folder / "record" / job.name / "defense" / "ft"
        for name in ("ft_df.csv", "ft_df_summary.csv", "defense_result.pt"):
            if (results / name).is_file():
                (results / name).replace(scratch / name)
    whole = ended.code == 0 and (scratch / "defense_result.pt").is_file()
    return Check("ft.py runs on the record", whole, ended.last_error or f"{ended.seconds:.0f} s")


def compare_figures(name: str, theirs: dict[str, float], ours: dict[str, float]) -> list[Check]:
    """Fractions must be equal to the last digit, losses to rounding."""
    checks = []
    for key in FRACTIONS:
        checks.append(Check(f"{name}: {key}", theirs[key] == ours[key], f"BackdoorBench {theirs[key]!r}  FMP {ours[key]!r}"))
    for key in LOSSES:
        if key in ours:
            close = abs(theirs[key] - ours[key]) <= LOSS_TOLERANCE * abs(theirs[key])
            checks.append(Check(f"{name}: {key}", close, f"BackdoorBench {theirs[key]:.7g}  FMP {ours[key]:.7g}"))
    return checks


def compare_data(answer: dict[str, Any], method: FMP, indexed: list[int]) -> list[Check]:
    """The clean subset, by seed and by file, and the poisoned test images: positions, labels and pixels."""
    data, subset = method.test_data, method.subset
    count, total = len(data.targets), answer["sizes"]["clean_train"]
    targets, originals = data.targets.tolist(), data.originals.tolist()
    return [
        Check("clean subset of the seed", answer["seeded_subset"] == subset, f"{len(subset)} of {total} indices"),
        Check("clean subset of --index", answer["indexed_subset"] == indexed, f"{len(indexed)} indices"),
        Check("clean subset: labels", answer["subset_labels"] == method.clean_labels.tolist(), f"{len(subset)} labels"),
        Check("clean subset: pixels", answer["subset_pixels"] == _sha256(method.clean_images), "SHA-256 of all"),
        Check("poisoned test set: attack labels", answer["poisoned_targets"] == targets, f"{count} labels"),
        Check("poisoned test set: true labels", answer["poisoned_originals"] == originals, f"{count} labels"),
        Check("poisoned test set: pixels", answer["poisoned_pixels"] == _sha256(data.poisoned_images), "SHA-256 of all"),
    ]


def _sha256(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def compare_tables(theirs: Path, ours: Path) -> list[Check]:
    """Columns, row labels and the way values are written, of one csv file of BackdoorBench's ft and the same one of FMP."""
    if not theirs.is_file():
        return [Check(f"{ours.name} against {theirs.name}", False, "BackdoorBench's ft wrote none")]
    expected, found = (pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False) for path in (theirs, ours))
    summary = "summary" in ours.name
    labels = list(expected.index) if summary else [str(row) for row in range(len(found))]
    columns = list(expected.columns) == list(found.columns)
    rows = [str(label) for label in found.index]
    checks = [
        Check(f"{ours.name}: columns", columns, ",".join(map(str, found.columns))),
        Check(f"{ours.name}: row labels", rows == labels, ",".join(rows)),
    ]
    if columns:
        odd = [c for c in expected if not _kinds(found[c]) - {"nothing", "nan_value"} <= _kinds(expected[c])]
        checks.append(
            Check(f"{ours.name}: value formats", not odd, f"unlike in {', '.join(map(str, odd))}" if odd else "alike")
        )
    return checks


def _kinds(column: pd.Series) -> set[str]:
    kinds = {"nothing": "", "whole": r"-?\d+", "decimal": r"-?\d+\.\d+(e-?\d+)?|\d+(\.\d+)?e-\d+", "truth": "True|False"}
    kinds["nan_value"] = "nan_value"
    return {next((kind for kind, form in kinds.items() if re.fullmatch(form, value)), f"text {value!r}") for value in column}


def compare_results(theirs: Path, ours: Path) -> Check:
    """``defense_result.pt``: the same keys in the same order, and tensors of the same names, order, shapes and dtypes."""
    name = "defense_result.pt is built as ft's"
    if not theirs.is_file():
        return Check(name, False, "BackdoorBench's ft wrote none")
    shapes = []
    for path in (theirs, ours):
        content = load_torch_file(path)
        tensors = [(key, tuple(value.shape), str(value.dtype)) for key, value in content["model"].items()]
        shapes.append((list(content), tensors))
    return Check(name, shapes[0] == shapes[1], f"{', '.join(shapes[1][0])}; {len(shapes[1][1])} tensors")


def check_class(job: Job) -> Check:
    """In the checkout, ``FMP`` must derive from BackdoorBench's own class."""
    name = "from defense.fmp import FMP is a BB defense"
    if not (job.checkout / "defense" / "fmp.py").exists():
        return Check(name, None, "FMP is not installed there (record_scripts/install.py)")
    code = "from defense.fmp import FMP; import defense.base as b; print(b.__file__, issubclass(FMP, b.defense))"
    # -B: no compiled files in the checkout. The current folder is the checkout, as it is for BackdoorBench's users.
    ran = subprocess.run([sys.executable, "-B", "-c", code], cwd=job.checkout, capture_output=True, text=True)
    words = ran.stdout.split()
    passed = len(words) == 2 and Path(words[0]).resolve().is_relative_to(job.checkout) and words[1] == "True"
    return Check(name, passed, (ran.stdout or ran.stderr).strip().splitlines()[-1])


def check_parity(job: Job, settings: dict[str, Any], python: str) -> list[Check]:
    """All checks.

    Raises:
        UserError: FMP has not run on the record yet, or BackdoorBench fails on it.
    """
    results = job.record.folder / "defense" / "fmp"
    if not (results / "metrics.json").is_file():
        raise UserError(f"There is no FMP result in {results}; run python defense/fmp.py --result_file {job.name} first.")
    method = FMP(settings)
    method.set_result(job.name)
    device = str(method.compute.device)
    with tempfile.TemporaryDirectory(prefix="fmp_parity_") as temporary:
        scratch = Path(temporary)
        indexed = sorted(method.subset)[::-1]  # a subset in an order that no seed gives
        index = scratch / "index.txt"
        index.write_text("".join(f"{i}\n" for i in indexed))
        by_file = FMP({**settings, "index": str(index)})
        by_file.set_result(job.name)
        answer = ask_backdoorbench(job, method, str(index), device, python, scratch)
        sizes = ", ".join(f"{key} {value}" for key, value in answer["sizes"].items())
        attacked = vars(evaluate(method.model, method.test_data, method.settings.batch_size))
        after = json.loads((results / "metrics.json").read_text())["after"]
        checks = [Check("load_attack_result reads the record", True, sizes)]
        checks += compare_figures("attacked model", answer["attacked"], attacked)
        checks += compare_figures("defense_result.pt", answer["defended"], after)
        checks += compare_data(answer, method, by_file.subset)
        checks.append(run_ft(job, answer["sizes"]["clean_train"], device, python, scratch))
        for suffix in ("df.csv", "df_summary.csv"):
            checks += compare_tables(scratch / f"ft_{suffix}", results / f"fmp_{suffix}")
        checks.append(compare_results(scratch / "defense_result.pt", results / "defense_result.pt"))
    return [*checks, check_class(job)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backdoorbench", default=str(ROOT), help="root of a BackdoorBench checkout (default: around this script)"
    )
    parser.add_argument("--result_file", required=True, help="the record: a folder below --record_root")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs BackdoorBench (default: this one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        device = str(choose_device(args.device).device)
        job = open_job(args.backdoorbench, args.record_root, args.result_file, args.dataset_path)
        settings = {"device": device, "record_root": args.record_root, "dataset_path": args.dataset_path}
        checks = check_parity(job, settings, args.python)
    except UserError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, checks)))
    failed = sum(check.passed is False for check in checks)
    skipped = sum(check.passed is None for check in checks)
    print(f"\n{len(checks) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
