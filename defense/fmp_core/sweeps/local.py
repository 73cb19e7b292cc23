"""The queue of a sweep on this machine: one job at a time per slot (a share of a GPU or the CPU); shared work is done once."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean

from fmp_core.errors import UserError
from fmp_core.metrics import in_percent
from fmp_core.sweeps.jobs import Job, Outcome, allow_jobs, finished, run, stop_all

Report = Callable[[Job, Outcome], None]


def local_slots(device: str, workers: int, processes: int = 1) -> list[dict[str, str]]:
    """One environment per job that may run at the same time: ``workers`` on each GPU of ``device``, or on the CPU.

    Jobs share the CPU's cores. Neighbouring slots are of different GPUs, so that few jobs spread over all of them. A job of
    several ``processes`` gets as many GPUs. Raises UserError: ``device`` names GPUs that are not there, or too few.
    """
    names: list[str] = []
    if device != "cpu":
        from fmp_core.system.devices import visible_gpus  # imports torch

        names = visible_gpus()
    if device.startswith("cuda") and not names:
        raise UserError(f"device is {device}, but no CUDA device is visible; set device: cpu.")
    if named := re.fullmatch(r"cuda:(\d+(?:,\d+)*)", device):
        numbers = [int(number) for number in named[1].split(",")]
        if max(numbers) >= len(names):
            raise UserError(f"device is {device}, but this machine has {len(names)} CUDA device(s), numbered from 0.")
        names = [names[number] for number in numbers]
    groups = [names[first : first + processes] for first in range(0, len(names) - processes + 1, processes)]
    if names and not groups:
        raise UserError(f"processes is {processes}, one for each GPU of a job, but device {device} has {len(names)}.")
    places = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups] or [{}]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))  # "4,2": of nested regions
    threads = str(max(1, min(cores // (workers * len(places)), int(asked[0]) if asked else cores)))
    return [{**place, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} for place in places] * workers


def may_start(job: Job, waiting: Sequence[Job], running: Sequence[Job], shared: set[str]) -> bool:
    """Whether nothing that ``job`` needs is still to come; ``shared`` is the shared work that is done.

    A record must be made before it is defended; of the jobs that share work one must end before the others start, so that they
    find its scores or triggers; and one at a time writes into a folder, as BackdoorBench's runs of one defense on a record do.
    """
    if job.kind == "record":
        return True
    if any(other.kind == "record" and other.record == job.record for other in (*waiting, *running)):
        return False
    if any(other.output == job.output for other in running):
        return False
    return job.shared_work is None or job.shared_work in shared or job.shared_work not in {it.shared_work for it in running}


def run_local(
    jobs: Sequence[Job], sweep: Path, slots: Sequence[Mapping[str, str]], report: Report, timeout: float | None = None
) -> None:
    """Run all jobs; a failure stops none of the others. ``report`` is called in this thread as each job ends."""
    waiting, free = list(jobs), list(slots)
    shared: set[str] = set()
    running: dict[Future[Outcome], tuple[Job, Mapping[str, str]]] = {}
    allow_jobs()
    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            while waiting or running:
                for job in list(waiting):
                    if free and may_start(job, waiting, [other for other, _ in running.values()], shared):
                        waiting.remove(job)
                        slot = free.pop()
                        running[pool.submit(run, job, sweep, slot, timeout)] = (job, slot)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, slot = running.pop(future)
                    free.append(slot)
                    outcome = future.result()
                    if job.shared_work and outcome.problem is None:
                        shared.add(job.shared_work)
                    report(job, outcome)
        except BaseException:
            stop_all()
            raise


class Board:
    """The printed progress of a sweep: a line per job that ends, with what is ``left`` and about how long it takes.

    Jobs that need no run are counted as ``skipped`` at once.
    """

    def __init__(self, jobs: Sequence[Job], workers: int):
        self.total, self.workers = len(jobs), workers
        self.left = list(jobs)
        self.seconds: dict[str, list[float]] = {}
        self.failed: list[tuple[Job, str]] = []
        self.started = time.monotonic()
        for job in jobs:
            if outcome := finished(job):
                self._count(job, outcome)
        self.skipped = len(jobs) - len(self.left)

    def _count(self, job: Job, outcome: Outcome) -> None:
        self.left.remove(job)
        if outcome.seconds:
            self.seconds.setdefault(job.method, []).append(outcome.seconds)

    def report(self, job: Job, outcome: Outcome) -> None:
        self._count(job, outcome)
        ended = "made"
        if outcome.problem:
            self.failed.append((job, outcome.problem))
            ended = f"FAILED {outcome.problem}"
        elif outcome.result:
            ended = in_percent(outcome.result.metrics)
        number = self.total - len(self.left)
        left = f"  ({len(self.left)} left, about {readable(self.eta())})" if self.left else ""
        print(f"[{number}/{self.total}] {job.name}  {readable(outcome.seconds)}  {ended}{left}", flush=True)

    def eta(self) -> float:
        """Seconds, from the mean time of ended jobs of the same method (of all jobs where there is none)."""
        known = [seconds for values in self.seconds.values() for seconds in values]
        if not known:
            return float("nan")
        return sum(mean(self.seconds.get(job.method) or known) for job in self.left) / min(self.workers, max(1, len(self.left)))

    def summary(self) -> int:
        """Print how it ended; returns the exit code."""
        took = readable(time.monotonic() - self.started)
        done = self.total - len(self.left) - len(self.failed)
        print(f"{done} of {self.total} jobs done ({self.skipped} were done before), {len(self.failed)} failed, in {took}")
        for job, problem in self.failed:
            print(f"failed: {job.name}: {problem}", file=sys.stderr)
        return 1 if self.failed or self.left else 0


def readable(seconds: float) -> str:
    """``75`` -> ``75 s``, ``600`` -> ``10 min``, from 100 minutes on in hours; NaN is an unknown time."""
    if seconds != seconds:
        return "an unknown time"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
