"""What ``make test-cuda`` does on a machine with an NVIDIA GPU: checks and measurements, in one table for a bug report."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fmp_core import PROJECT
from fmp_core.errors import UserError

DIGITS = ("--yaml_path", str(PROJECT / "config" / "defense" / "fmp" / "digits.yaml"))
LEAST_AGREEMENT = 0.95  # Jaccard index of the maps selected on GPU and CPU: kernels differ, and near ties fall otherwise


def require_gpu() -> None:
    """Raises UserError if the driver shows no GPU; torch may not be installed yet."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        ready = False
    if not ready or not count.value:
        raise UserError("There is no CUDA device on this machine, and these checks need one; `make test` runs without.")


class Row(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool | None  # None where nothing is checked
    figures: str


@dataclass(frozen=True)
class Checks:
    """Runs everything in ``folder``, which keeps the record, the results and what was printed."""

    folder: Path
    quick: bool = False

    def run(self) -> list[Row]:
        """All rows of the table; a failed check stops no other."""
        tests, few, make, bench, sizes = "cuda", [], [], ["--training"], ["64", "1024"]
        if self.quick:
            tests, few = "cuda and not slow", ["--frg_samples", "2", "--epochs", "1", "--test_images", "16"]
            make = ["--model", "squeezenet1_0", "--limit_train", "40", "--epochs", "1"]
            bench, sizes = ["--model", "squeezenet1_0", "--maps", "26"], ["2", "4"]
        steps: dict[str, Callable[[], str]] = {
            "tests marked cuda": partial(self.test, "-m", tests),
            "record (make_record.py)": partial(self._record, *make),
            "fmp.py --preset paper": partial(self._defend, "paper", *DIGITS, *few),
            "fmp.py --preset strong": partial(self._defend, "strong", "--preset", "strong", *few),
            "selection on GPU and CPU (fp32)": partial(self._selection, *DIGITS, *few),
        }
        for size in sizes:
            steps[f"bench_frg.py, {size} images"] = partial(self._bench, size, *bench)
        return [*environment(), *(self.row(name, work) for name, work in steps.items())]

    def row(self, name: str, work: Callable[[], str]) -> Row:
        """What ``work`` says, or why it failed."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            figures = work()
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            return Row(name, False, f"{type(error).__name__}: {error}")
        return Row(name, True, f"{figures}; {time.monotonic() - started:.0f} s in all")

    def call(self, name: str, *command: str, cwd: Path | None = None) -> list[str]:
        """Run ``command`` by this Python; what it prints goes to ``<name>.log``. Returns the lines that are not blank."""
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            ran = subprocess.run([sys.executable, *command], cwd=cwd or self.folder, stdout=file, stderr=subprocess.STDOUT)
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if ran.returncode:
            failed = [line.split()[1].rpartition("::")[2] for line in lines if line.startswith(("FAILED ", "ERROR "))]
            which = f" ({', '.join(failed[:5])}{', ...' if failed[5:] else ''})" if failed else ""
            raise RuntimeError(f"exit code {ran.returncode}: {lines[-1][:200] if lines else ''}{which} (all of it: {log})")
        return lines

    def test(self, *flags: str) -> str:
        """Run the project's tests; what pytest says at its end."""
        return self.call("tests", "-m", "pytest", "-n0", *flags, cwd=PROJECT)[-1]

    def _record(self, *flags: str) -> str:
        # One of an earlier check may be of older code, whether or not that came to its end.
        shutil.rmtree(self.folder / "record" / "badnet_digits", ignore_errors=True)
        self._script("make_record", "record", *flags, "--device", "cuda:0", "--quiet", "--fresh")
        return "badnet_digits"

    def _script(self, script: str, name: str, *flags: str) -> None:
        self.call(name, str(PROJECT / "record_scripts" / f"{script}.py"), *flags)

    def _fmp(self, name: str, *flags: str) -> Path:
        """Defend the record; returns the result folder."""
        start = str(PROJECT / "defense" / "fmp.py"), "--result_file", "badnet_digits", "--defense_name", name, "--fresh"
        self.call(name, *start, *flags)
        return self.folder / "record" / "badnet_digits" / "defense" / name

    def _defend(self, name: str, *flags: str) -> str:
        metrics = json.loads((self._fmp(name, *flags, "--device", "cuda:0") / "metrics.json").read_text(encoding="utf-8"))
        if not metrics["device"].startswith("cuda"):
            raise RuntimeError(f"it ran on {metrics['device']}")
        moves = [
            f"{label} {100 * metrics['before'][key]:.2f} -> {100 * metrics['after'][key]:.2f}"
            for label, key in (("Acc", "test_acc"), ("ASR", "test_asr"), ("RA", "test_ra"))
        ]
        stages = [f"{stage} {seconds:.1f} s" for stage, seconds in metrics["seconds"].items()]
        return f"{', '.join(moves)}; {', '.join(stages)}"

    def _selection(self, *flags: str) -> str:
        import pandas as pd

        flags = (*flags, "--dtype", "fp32", "--epochs", "0", "--test_images", "16", "--report", "False")
        gpu, cpu = (
            pd.read_csv(self._fmp(name, *flags, "--device", device) / "feature_maps.csv")
            for name, device in (("select-cuda", "cuda:0"), ("select-cpu", "cpu"))
        )
        chosen, equal = cpu["pruned"], 100 * (gpu["correct"] == cpu["correct"]).mean()
        both, either = int((gpu["pruned"] & chosen).sum()), int((gpu["pruned"] | chosen).sum())
        error = (gpu["margin"] - cpu["margin"]).abs().max()
        figures = f"{both} of {int(chosen.sum())} maps the same; counts equal for {equal:.2f} % of {len(cpu)} maps"
        figures += f", margins differ by at most {error:.1e}"
        if not either or both / either < LEAST_AGREEMENT:
            raise RuntimeError(figures)
        return figures

    def _bench(self, size: str, *flags: str) -> str:
        import pandas as pd

        name, table = f"bench{size}", self.folder / f"bench{size}.csv"
        flags = ("--images", size, "--against", "released", *flags, "--device", "cuda:0", "--csv", str(table))
        self._script("bench_frg", name, *flags)
        return "; ".join(f"{row.dtype} {row.figure} {row.value:.4g}" for row in pd.read_csv(table).itertuples())


def environment() -> list[Row]:
    """Device, driver and versions."""
    import torch

    from fmp_core.system.versions import versions

    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"  # nvidia-smi does not look at it
    wanted = "driver_version,memory.total,mig.mode.current"
    query = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader", f"--id={first}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "nvidia-smi does not answer"
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    libraries = {**versions(), "CUDA": torch.version.cuda, "cuDNN": cudnn}
    return [
        Row("device", None, f"{torch.cuda.get_device_name(0)}, compute capability {capability}"),
        Row("driver, memory, MIG", None, driver),
        Row("versions", None, ", ".join(f"{name} {version}" for name, version in libraries.items())),
        Row("system", None, platform.platform()),
    ]


def as_table(rows: list[Row]) -> str:
    """Markdown."""
    words = {True: "passed", False: "FAILED", None: ""}
    cells = [(row.name, words[row.passed], row.figures) for row in rows]
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells]
    return "\n".join(["| FMP on CUDA | | |", "|---|---|---|", *lines])


def check_cuda(folder: Path, quick: bool = False) -> int:
    """Run all checks in ``folder``, print the table and keep it there as ``table.md``. Returns 1 if any failed.

    ``quick``: with a small model and few images, in a folder of its own below.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no CUDA device; install a CUDA build of it that fits the driver (https://pytorch.org)."
        )
    folder = folder / "quick" if quick else folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = Checks(folder.resolve(), quick).run()
    table = as_table(rows)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return int(any(row.passed is False for row in rows))
