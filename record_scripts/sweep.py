#!/usr/bin/env python3
"""Run a matrix of records x defenses x settings x seeds.

    python record_scripts/sweep.py SWEEP.yaml                      # on this machine: each visible GPU, or `workers` on the CPU
    python record_scripts/sweep.py SWEEP.yaml --dry-run            # print the commands
    python record_scripts/sweep.py SWEEP.yaml --launcher slurm     # on a cluster

Running it again skips what is done. docs/sweeps.md describes the sweep file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.errors import UserError
from fmp_core.sweeps.jobs import Job, finished, read_stamp, settings_hash, stop_leftovers
from fmp_core.sweeps.local import Board, local_slots, run_local
from fmp_core.sweeps.plan import Sweep, plan, read_sweep
from fmp_core.sweeps.slurm import run_submitit


def check_records(jobs: Sequence[Job]) -> None:
    """Bad flags of make_record and records made with other settings are found before anything runs.

    Raises:
        UserError: a record of that name was made by a sweep with other settings.
        SystemExit: make_record refuses a flag (it says which).
    """
    for job in (job for job in jobs if job.kind == "record"):
        stamp = read_stamp(job.folder)
        if not finished(job):
            import make_record  # imports torch, which takes seconds

            make_record.parse(list(job.command[2:]))
        if stamp and stamp.get("hash") != settings_hash(job):
            raise UserError(f"{job.folder} was made with other settings; remove it, or give the new record another name.")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock. Raises UserError if the sweep runs already."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"The sweep in {folder} is running already; wait for it, or stop it first.") from None
        yield


def show(jobs: Sequence[Job]) -> None:
    for job in jobs:
        done = finished(job) is not None
        print(f"# {job.name}{' (done)' if done else ''}\n{shlex.join(job.command)}")
    print(f"# {len(jobs)} jobs")


def run_sweep(sweep: Sweep, launcher: str = "local", dry_run: bool = False) -> int:
    """Run all jobs of ``sweep``; the exit code is 1 if one failed. Raises UserError as :func:`plan` and the launchers do."""
    jobs = plan(sweep)
    check_records(jobs)
    if dry_run:
        show(jobs)
        return 0
    with alone(sweep.folder):
        if launcher == "local":
            left = stop_leftovers(sweep.folder)
            if left:
                print(f"stopped {left} processes that a killed run of this sweep had left", flush=True)
        slots = local_slots(sweep.device, sweep.workers) if launcher == "local" else [{}] * len(jobs)
        board = Board(jobs, len(slots))
        todo = board.skip_finished()
        print(f"sweep {sweep.name}: {len(jobs)} jobs, {board.skipped} done before; logs in {sweep.folder / 'logs'}", flush=True)
        if launcher == "local":
            run_local(todo, sweep.folder, slots, board.report, 60 * sweep.timeout if sweep.timeout else None)
        else:
            run_submitit(todo, sweep, board.report, "slurm" if launcher == "slurm" else "local")
        return board.summary()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--launcher", choices=["local", "slurm", "submitit-local"], default="local")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is done, run nothing")
    args = parser.parse_args(argv)
    try:
        return run_sweep(read_sweep(args.sweep), args.launcher, args.dry_run)
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
