"""Run a defense or an analysis of BackdoorBench on a record, and say how it went. Imports no torch; BackdoorBench does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fmp_core.backdoorbench.process import Ended, in_own_process, run_script
from fmp_core.backdoorbench.shims import DTYPE, TEST_IMAGES
from fmp_core.backdoorbench.workspace import PLOTS, Job, workspace
from fmp_core.data.names import BB_DATASETS, DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.results.read import (
    ATTACK_DIGEST,
    MODEL_DIGEST,
    NO_FINAL_TEST,
    RUN_DTYPE,
    RUN_NOTE,
    SAMPLE_ONLY,
    SWEEP_MARK,
    WHOLE_TEST,
)
from fmp_core.storage.files import (
    aside_by_sweep,
    bring_back,
    file_digest,
    make_folders,
    put_aside,
    refuse_links_out_of,
    write_text,
)
from fmp_core.storage.lock import locked, result_lock

NO_DEFENSES = {"__init__", "base", "dataset_load_mode", "fmp"}  # of defense/*.py
JOINED = {"nc": ["--log"], "nab": ["--log", "--checkpoint_save"]}  # they take these to lie below the current folder
WRITTEN = ("--checkpoint_save", "--log", "--save_path")  # flags of BackdoorBench for folders it writes into


def run_on_record(
    job: Job,
    method: str,
    analysis: str | None,
    python: str,
    extra: list[str],
    test_images: int | None = None,
    dtype: str = "fp32",
) -> tuple[str, int]:
    """Run ``defense/<method>.py`` on the record or, with ``analysis``, ``analysis/visual_<analysis>.py`` on what ``method``
    made of it. Returns one sentence on how it went, and the exit code.

    ``python`` runs BackdoorBench's script, which is given the flags ``extra`` after ours. With ``test_images`` a defense tests
    on so many images only while it runs; the model it ends with is tested on all of them by us, into ``whole_test.json``.
    With ``dtype`` bf16 it computes under torch's autocast, on a CPU only, where BackdoorBench's own amp does nothing.

    Raises UserError if there is no such script or no result to analyse, BackdoorBench cannot be given the record, or another
    run writes there.
    """
    if test_images:
        _check_final_test(job, method, analysis, extra)
    if joined := [flag for flag in JOINED.get(method, []) if any(word.partition("=")[0] == flag for word in extra)]:
        raise UserError(f"{joined[0]} cannot be used with {method}, which writes elsewhere then; leave it out.")
    if dtype != "fp32" and (analysis or not job.device.startswith("cpu")):
        raise UserError(f"--dtype {dtype} is for defenses on a CPU; leave it out with --analysis, and on CUDA, which has amp.")
    adapted = {TEST_IMAGES: str(test_images or 0), DTYPE: dtype}
    results, flags = job.folder / "defense" / method, job.flags
    if analysis is None:
        script, log = find_script(job.checkout, "defense", "", method), results / "run_defense.log"
        if "--dataset_path" in (job.checkout / script).read_text(encoding="utf-8", errors="replace"):
            flags += ["--dataset_path", "./data"]  # dbd's YAML files have none
        flags += ["--result_file", job.name]
    else:
        script, log = find_script(job.checkout, "analysis", "visual_", analysis), results / f"visual_{analysis}.log"
        flags += ["--result_file_attack", job.name, "--result_file_defense", f"{job.name}/defense/{method}"]
        if not (results / DEFENSE_FILE).is_file():
            raise UserError(f"There is no {results / DEFENSE_FILE} to analyse; run the defense {method} first.")
        refuse_links_out_of(job.folder, results / PLOTS, *(results / PLOTS).rglob("*"))
    refuse_links_out_of(job.folder, results, log)
    started = time.time() - 1  # file systems with coarse clocks
    with _alone(results, method), contextlib.nullcontext() if analysis else _old_result_kept(results, log) as outcome:
        make_folders(results)
        if test_images:
            write_text(results / WHOLE_TEST, json.dumps({SAMPLE_ONLY: test_images}))
        with workspace(job, analysed=method if analysis else None) as folder:
            flags += [_from_here(before, word) for before, word in pairwise(["", *extra])]
            ended = run_script(folder, script, flags, gpus=job.gpus, python=python, log=log, adapted=adapted)
        said, code = how_it_ended(f"analysis {analysis}" if analysis else method, ended, log, None if analysis else started)
        if test_images and not code:
            in_own_process(_final_test, job, results)
        if outcome and not code:
            outcome.ended = True
            note = {MODEL_DIGEST: file_digest(results / DEFENSE_FILE), ATTACK_DIGEST: job.digest}
            write_text(results / RUN_NOTE, json.dumps({**note, RUN_DTYPE: dtype, SAMPLE_ONLY: test_images}) + "\n")
    return said.replace(str(log), str(outcome.log)) if outcome else said, code


def _check_final_test(job: Job, method: str, analysis: str | None, extra: list[str]) -> None:
    """Raises UserError: the model that ``method`` ends with cannot be tested by us, as ``--test_images`` needs."""
    if analysis:
        raise UserError("--test_images is for defenses; leave it out with --analysis.")
    if job.dataset not in BB_DATASETS:
        raise UserError(f"--test_images cannot be used with {job.dataset}, whose preprocessing only BackdoorBench knows.")
    if method in NO_FINAL_TEST or (method == "anp" and _sets_pruning_number(extra)):
        raise UserError(
            f"--test_images cannot be used with {method}, which saves another model than the one it tests; leave it out."
        )


def _from_here(before: str, word: str) -> str:
    """A flag or value, which follows ``before``; a file in it, or a folder of :data:`WRITTEN`, is named from where we were
    started, and BB runs elsewhere. A slash at a folder's end is kept: BB joins names to it."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    written = value and (flag or before) in WRITTEN
    return f"{flag}{equals}{os.path.join(os.getcwd(), value)}" if written or os.path.isfile(value) else word


def _sets_pruning_number(flags: list[str]) -> bool:
    """Whether ``flags`` of anp, or YAML files among them, say ``pruning_number``: it then tests one model and saves another."""
    names = [word.partition("=")[0] for word in flags]
    files = [Path(word.rpartition("=")[2]) for word in flags if re.search(r"\.ya?ml$", word)]
    said = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    abbreviated = any(len(name) > 4 and "--pruning_number".startswith(name) for name in names)
    return abbreviated or any("pruning_number" in text for text in said)


@dataclass
class _Outcome:
    """Where the log of a run lies, and whether the run came to its end."""

    log: Path
    ended: bool = False


@contextlib.contextmanager
def _old_result_kept(results: Path, log: Path) -> Iterator[_Outcome]:
    """Put an earlier result aside, since a mixture of two runs would be read as one; and back, if the new run fails. Of that
    the log is kept beside the folder. A sweep does the same for itself."""
    outcome, aside = _Outcome(log), results.with_name(f".{results.name}.before")
    failed = results.with_name(f"{results.name}.failed.log")
    if SWEEP_MARK in os.environ:
        yield outcome
        return
    bring_back(results, aside_by_sweep(results))
    with put_aside(results, aside, RUN_NOTE) as earlier:
        try:
            yield outcome
        finally:
            earlier.replaced = outcome.ended
            if outcome.ended:
                failed.unlink(missing_ok=True)
            elif aside.exists():
                outcome.log = failed
                if log.is_file():
                    log.replace(failed)


def _alone(results: Path, method: str) -> contextlib.AbstractContextManager[None]:
    """The lock that sweeps take, too; a sweep that started this process holds it already."""
    if SWEEP_MARK in os.environ:
        return contextlib.nullcontext()
    busy = f"Another run of {method} writes into the results of this record; wait for its end."
    return locked(results.parent, wait=False, busy=busy, name=result_lock(results))


def _final_test(job: Job, results: Path) -> None:
    from fmp_core.backdoorbench.final_test import write_final_test  # imports torch

    write_final_test(job, results)


def find_script(checkout: Path, folder: str, prefix: str, name: str) -> str:
    """``folder/<prefix><name>.py`` of the checkout. Raises UserError naming those there are."""
    stems = {path.stem for path in (checkout / folder).glob(f"{prefix}*.py")} - NO_DEFENSES
    names = sorted(stem.removeprefix(prefix) for stem in stems)
    if folder == "defense" and name == "fmp":
        raise UserError("This runs BackdoorBench's own defenses; FMP runs by itself: python defense/fmp.py --result_file ...")
    if name not in names:
        raise UserError(f"{checkout / folder} has no {prefix}{name}.py to run; there are {', '.join(names)}.")
    return f"{folder}/{prefix}{name}.py"


def how_it_ended(script: str, ended: Ended, log: Path, started: float | None) -> tuple[str, int]:
    """One sentence on how it went, and the exit code. With ``started`` (seconds since the epoch), ending without a
    ``defense_result.pt`` younger than that is a failure too."""
    results = log.parent
    if ended.code:
        code = ended.code if ended.code > 0 else 128 - ended.code
        return f"BackdoorBench's {script} did not run to its end: {ended}; see {log}", code
    said = f"BackdoorBench's {script} ended after {ended.seconds:.0f} s"
    if started is None:
        return f"{said}; results are below {results}", 0
    if not (results / DEFENSE_FILE).is_file() or (results / DEFENSE_FILE).stat().st_mtime < started:
        return f"{said} but wrote no {results / DEFENSE_FILE}; see {log}", 1
    tables = sorted(str(path.relative_to(results)) for path in results.rglob("*.csv"))
    return f"{said}; in {results} are {', '.join([DEFENSE_FILE, *tables])}", 0
