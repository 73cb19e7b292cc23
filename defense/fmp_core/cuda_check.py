"""What ``make test-cuda`` does on a machine with an NVIDIA GPU: checks and measurements, in one table for a bug report."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fmp_core.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
LEAST_AGREEMENT = 0.95  # Jaccard index of the maps selected on GPU and CPU: kernels differ, and near ties fall otherwise


def require_gpu() -> None:
    """Ask the driver itself for a GPU, since torch may not be installed yet.

    Raises:
        UserError: there is no driver, or it shows no GPU.
    """
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        ready = False
    if not ready or not count.value:
        raise UserError("There is no CUDA device on this machine, and these checks need one; `make test` runs without.")


@dataclass(frozen=True)
class Plan:
    """Flags of the commands that are run. ``make`` makes the record badnet_digits, ``bench`` holds one set for each size."""

    tests: tuple[str, ...]
    make: tuple[str, ...]
    paper: tuple[str, ...]
    strong: tuple[str, ...]
    bench: tuple[tuple[str, ...], ...]


DIGITS = ("--yaml_path", str(PROJECT / "config" / "defense" / "fmp" / "digits.yaml"))
FULL = Plan(
    tests=("-m", "cuda"),
    make=(),
    paper=DIGITS,
    strong=("--preset", "strong"),
    bench=tuple(("--images", images, "--against", "released", "--training") for images in ("64", "1024")),
)
FEW = ("--frg_samples", "2", "--epochs", "1", "--test_images", "16")
QUICK = Plan(
    tests=("-m", "cuda and not slow"),
    make=("--model", "squeezenet1_0", "--limit_train", "40", "--epochs", "1"),
    paper=(*DIGITS, *FEW),
    strong=("--preset", "strong", *FEW),
    bench=tuple(
        ("--model", "squeezenet1_0", "--images", images, "--maps", "26", "--against", "released") for images in ("2", "4")
    ),
)


class Row(NamedTuple):
    """One line of the table; ``passed`` is None where nothing is checked."""

    name: str
    passed: bool | None
    figures: str


class CheckError(Exception):
    """A check failed; the message goes into the table."""


@dataclass(frozen=True)
class Checks:
    """Runs everything in ``folder``, which keeps the record, the results and what was printed."""

    plan: Plan
    folder: Path

    def run(self) -> list[Row]:
        """All rows of the table; a failed check stops no other."""
        steps: dict[str, Callable[[], str]] = {
            "tests marked cuda": self._tests,
            "record (make_record.py)": self._record,
            "fmp.py --preset paper": partial(self._defend, "paper", self.plan.paper),
            "fmp.py --preset strong": partial(self._defend, "strong", self.plan.strong),
            "selection on GPU and CPU (fp32)": self._selection,
        }
        for flags in self.plan.bench:
            size = flags[flags.index("--images") + 1]
            steps[f"bench_frg.py, {size} images"] = partial(self._bench, size, flags)
        return [*environment(), *(self.row(name, work) for name, work in steps.items())]

    def row(self, name: str, work: Callable[[], str]) -> Row:
        """What ``work`` says, or why it failed."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            figures = work()
        except (CheckError, OSError, ValueError, KeyError) as error:
            return Row(name, False, f"{type(error).__name__}: {error}")
        return Row(name, True, f"{figures}; {time.monotonic() - started:.0f} s in all")

    def call(self, name: str, *command: str, cwd: Path | None = None) -> None:
        """Run ``command`` by this Python; what it prints goes to ``<name>.log``."""
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            ran = subprocess.run([sys.executable, *command], cwd=cwd or self.folder, stdout=file, stderr=subprocess.STDOUT)
        if ran.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            raise CheckError(f"exit code {ran.returncode}: {last.strip()[:200]} (all of it: {log})")

    def _tests(self) -> str:
        report = self.folder / "tests.xml"
        report.unlink(missing_ok=True)
        try:
            self.call("tests", "-m", "pytest", "-n0", *self.plan.tests, f"--junitxml={report}", cwd=PROJECT)
        except CheckError as error:
            raise CheckError(f"{junit_counts(report)}; {error}" if report.exists() else str(error)) from None
        return junit_counts(report)

    def _record(self) -> str:
        if not (self.folder / "record" / "badnet_digits" / "attack_result.pt").exists():
            self._script("make_record", "record", *self.plan.make, "--device", "cuda:0", "--quiet")
        return "badnet_digits"

    def _script(self, script: str, name: str, *flags: str) -> None:
        self.call(name, str(PROJECT / "record_scripts" / f"{script}.py"), *flags)

    def _fmp(self, name: str, *flags: str) -> Path:
        """Defend the record; returns the result folder."""
        start = str(PROJECT / "defense" / "fmp.py"), "--result_file", "badnet_digits", "--defense_name", name, "--fresh"
        self.call(name, *start, *flags)
        return self.folder / "record" / "badnet_digits" / "defense" / name

    def _defend(self, name: str, flags: tuple[str, ...]) -> str:
        metrics = json.loads((self._fmp(name, *flags, "--device", "cuda:0") / "metrics.json").read_text(encoding="utf-8"))
        if not metrics["device"].startswith("cuda"):
            raise CheckError(f"it ran on {metrics['device']}")
        moves = [
            f"{label} {100 * metrics['before'][key]:.2f} -> {100 * metrics['after'][key]:.2f}"
            for label, key in (("Acc", "test_acc"), ("ASR", "test_asr"), ("RA", "test_ra"))
        ]
        stages = [f"{stage} {seconds:.1f} s" for stage, seconds in metrics["seconds"].items()]
        return f"{', '.join(moves)}; {', '.join(stages)}"

    def _selection(self) -> str:
        import pandas as pd

        flags = (*self.plan.paper, "--dtype", "fp32", "--epochs", "0", "--test_images", "16", "--report", "False")
        gpu, cpu = (
            pd.read_csv(self._fmp(f"select-{name}", *flags, "--device", device) / "feature_maps.csv")
            for name, device in (("cuda", "cuda:0"), ("cpu", "cpu"))
        )
        chosen, equal = cpu["pruned"], 100 * (gpu["correct"] == cpu["correct"]).mean()
        both, either = int((gpu["pruned"] & chosen).sum()), int((gpu["pruned"] | chosen).sum())
        error = (gpu["margin"] - cpu["margin"]).abs().max()
        figures = f"{both} of {int(chosen.sum())} maps the same; counts equal for {equal:.2f} % of {len(cpu)} maps"
        figures += f", margins differ by at most {error:.1e}"
        if not either or both / either < LEAST_AGREEMENT:
            raise CheckError(figures)
        return figures

    def _bench(self, size: str, flags: tuple[str, ...]) -> str:
        import pandas as pd

        table = self.folder / f"bench{size}.csv"
        self._script("bench_frg", f"bench{size}", *flags, "--device", "cuda:0", "--csv", str(table))
        return "; ".join(
            _speeds(dtype, rows.set_index("figure")["value"]) for dtype, rows in pd.read_csv(table).groupby("dtype")
        )


def _speeds(dtype: object, value: Mapping[str, float]) -> str:
    """The figures of bench_frg.py in one precision, or of training and testing."""
    if "engine_map_images_per_s" in value:
        return (
            f"{dtype} {value['engine_map_images_per_s']:.0f} map-images/s, efficiency {value['efficiency']:.2f}, "
            f"{value['ratio_vs_released']:.2f} times the released scheme, {value['peak_memory_mib']:.0f} MiB"
        )
    kinds = ("finetune", "evaluate")
    return "; ".join(
        f"{kind} {value[f'{kind}_images_per_s']:.0f} images/s, efficiency {value[f'{kind}_efficiency']:.2f}" for kind in kinds
    )


def junit_counts(report: Path) -> str:
    """What pytest's JUnit file says: counts, and the tests that failed."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = f" ({', '.join(failed[:5])}{', ...' if len(failed) > 5 else ''})" if failed else ""
    return f"{len(cases) - len(failed) - len(skipped)} passed, {len(failed)} failed{names}, {len(skipped)} skipped"


def environment() -> list[Row]:
    """Device, driver and versions."""
    import torch

    from fmp_core.system.versions import versions

    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,mig.mode.current", "--format=csv,noheader", "--id=0"]
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

    Raises:
        UserError: torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no CUDA device; install a CUDA build of it that fits the driver (https://pytorch.org)."
        )
    folder = folder / "quick" if quick else folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = Checks(QUICK if quick else FULL, folder.resolve()).run()
    table = as_table(rows)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    return int(any(row.passed is False for row in rows))
