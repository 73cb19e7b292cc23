"""Running a sweep: its records are checked, it is locked, and a launcher works off what is not done yet."""

from __future__ import annotations

import shlex

from fmp_core.errors import UserError
from fmp_core.storage.lock import locked
from fmp_core.sweeps.jobs import finished, made_otherwise, stop_leftovers
from fmp_core.sweeps.local import Board, local_slots, run_local
from fmp_core.sweeps.plan import Sweep, plan
from fmp_core.sweeps.slurm import run_submitit

BUSY = "The sweep in {folder} is running already; wait for it, or stop it first."


def run_sweep(sweep: Sweep, launcher: str = "local", dry_run: bool = False) -> int:
    """Run all jobs of ``sweep``; the exit code is 1 if one failed. ``dry_run`` prints the commands and which of them are done.

    ``launcher`` is ``local``, ``slurm``, or ``submitit-local`` (submitit's own processes on this machine). Raises UserError: as
    ``plan`` and the launchers do, a record is missing or was made with other settings, or the sweep is running already.
    """
    jobs = plan(sweep)
    made = {job.record for job in jobs if job.kind == "record"}
    for job in jobs:
        if job.kind == "record":
            if problem := made_otherwise(job):
                raise UserError(problem)
        elif job.record not in made and not job.attack_file.is_file():
            raise UserError(f"records: {job.attack_file.parent} holds no attack record; check the name, and record_root.")
    if dry_run:
        for job in jobs:
            print(f"# {job.name}{' (done)' if finished(job) else ''}\n{shlex.join(job.command)}")
        print(f"# {len(jobs)} jobs")
        return 0
    with locked(sweep.folder, wait=False, busy=BUSY, name="lock"):
        if launcher == "local" and (stopped := stop_leftovers(sweep.folder)):
            print(f"stopped {stopped} processes that a killed run of this sweep had left", flush=True)
        slots = local_slots(sweep.device, sweep.workers, sweep.processes) if launcher == "local" else [{}] * len(jobs)
        board = Board(jobs, len(slots))
        print(f"sweep {sweep.name}: {len(jobs)} jobs, {board.skipped} done before; logs in {sweep.folder / 'logs'}", flush=True)
        if launcher == "local":
            run_local(board.left, sweep.folder, slots, board.report, sweep.seconds)
        else:
            run_submitit(board.left, sweep, board.report, "slurm" if launcher == "slurm" else "local")
        return board.summary()
