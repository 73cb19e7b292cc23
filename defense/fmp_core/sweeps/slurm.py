"""The jobs of a sweep on a Slurm cluster, through submitit: a few arrays, each waiting for the one before."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmp_core import PROJECT
from fmp_core.errors import UserError, in_one_line
from fmp_core.fields import fields_of
from fmp_core.sweeps.jobs import Job, Outcome, run
from fmp_core.sweeps.local import Report
from fmp_core.sweeps.plan import Slurm, Sweep

POLL = 5.0  # seconds between looks at the jobs' files


def waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """Records; then all that needs no other job; then what reads scores or triggers of an earlier job, or writes where an
    earlier one does, as BackdoorBench's runs of one defense on a record do (their seeds: a wave each)."""
    parts: list[list[Job]] = [[]]
    needed: dict[str | Path, int] = {}  # shared work -> the wave that does it; a folder -> the last wave that writes there
    for job in jobs:
        earlier = [needed[key] for key in (job.shared_work, job.output) if key in needed]
        wave = 0 if job.kind == "record" else 1 + max(earlier, default=0)
        parts += [[] for _ in range(wave + 1 - len(parts))]
        parts[wave].append(job)
        needed[job.output] = wave
        if job.shared_work:
            needed.setdefault(job.shared_work, wave)
    return [part for part in parts if part]


def run_submitit(jobs: Sequence[Job], sweep: Sweep, report: Report, cluster: str = "slurm", poll: float = POLL) -> None:
    """Submit all jobs and report each as it ends. Killing this process leaves submitted jobs running; a rerun waits for them.

    ``cluster`` is ``slurm``, or ``local`` for submitit's own processes on this machine. Raises UserError: submitit is not
    installed, or Slurm is not there or refuses the jobs.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher slurm needs submitit; run: pip install submitit") from None
    logging.getLogger("submitit").setLevel(logging.ERROR)  # where there is no sacct it warns at every look; squeue tells too
    # Nodes unpickle functions of fmp_core, which need not be installed there.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT / "defense"), os.environ.get("PYTHONPATH")]))
    before: Sequence[Any] = ()
    submitted: list[tuple[Job, Any]] = []
    for wave in waves(jobs):
        try:
            executor = submitit.AutoExecutor(folder=sweep.folder / "submitit", cluster=cluster)
            executor.update_parameters(**_parameters(sweep, cluster, before))
            with executor.batch():
                handles = [executor.submit(_on_node, job, sweep) for job in wave]
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            detail = in_one_line(error, 300)
            arrays = ", ".join(sorted({str(handle.job_id).split("_")[0] for _, handle in submitted}))
            queued = f" Already queued, and to be ended by scancel: {arrays}." if arrays else ""
            raise UserError(f"The jobs could not be submitted ({detail}); check the settings for slurm.{queued}") from None
        submitted += zip(wave, handles, strict=True)
        before = handles
        if cluster != "slurm":  # no dependencies there
            _await(submitted, report, poll, lambda: None)
            submitted = []
    _await(submitted, report, poll, _queued)


def _on_node(job: Job, sweep: Sweep) -> Outcome:
    """What a node runs: as many threads as Slurm gave CPUs. On SIGTERM, which submitit ignores, the job's process is ended in
    order, too: it is in a session of its own, where Slurm need not signal it."""
    signal.signal(signal.SIGTERM, _stop)
    threads = os.environ.get("SLURM_CPUS_PER_TASK")
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if threads else {}
    return run(job, sweep.folder, environment, sweep.seconds)


def _stop(_signal: int, _frame: Any) -> None:
    raise UserError("ended by SIGTERM (scancel, or another job took its place)")


def _parameters(sweep: Sweep, cluster: str, before: Sequence[Any]) -> dict[str, Any]:
    names = {name: field.metadata["submitit"] for name, field in fields_of(Slurm).items()}
    given = {"timeout_min": 600, **{names[name]: value for name, value in sweep.slurm.items()}, "name": sweep.name}
    if cluster != "slurm":
        return {key: value for key, value in given.items() if not key.startswith("slurm_")}
    if before:
        arrays = sorted({str(handle.job_id).split("_")[0] for handle in before})
        given["slurm_additional_parameters"] = {"dependency": "afterany:" + ":".join(arrays)}
    return given


def _await(
    submitted: Sequence[tuple[Job, Any]], report: Report, poll: float, unfinished: Callable[[], set[str] | None]
) -> None:
    left = list(submitted)
    gone: set[str] = set()  # in no queue when last looked for
    while left:
        queued = unfinished()
        for job, handle in list(left):
            number = str(handle.job_id)
            ended = handle.done()
            runs = queued is not None and number in queued  # also where there is a result: of a job that was requeued
            if ended and not runs:
                left.remove((job, handle))
                report(job, _outcome(handle))
            elif not ended and queued is not None and not runs:
                if number in gone:  # twice, so that a result just written has had time to appear
                    left.remove((job, handle))
                    report(job, Outcome(0, f"Slurm ended it without a result (log: {handle.paths.stderr})"))
                gone.add(number)
            elif runs:
                gone.discard(number)  # squeue missed it
        if left:
            time.sleep(poll)


def _queued() -> set[str] | None:
    """Slurm's unfinished jobs; None if it does not say. Submitit asks sacct, which not every cluster has."""
    try:
        command = ["squeue", "--noheader", "--array", "--format=%i"]
        return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    except (OSError, subprocess.SubprocessError):
        return None


def _outcome(handle: Any) -> Outcome:
    try:
        return handle.result()
    except Exception as error:  # submitit wraps what killed the job: time limit, out of memory, a node that died
        line = next((text for text in reversed(str(error).splitlines()) if text.strip()), type(error).__name__)
        return Outcome(0, f"{line[:200]} (log: {handle.paths.stderr})")
