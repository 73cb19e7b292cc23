"""Sweeps: what a kill, or Ctrl-C, leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fmp_core.results.read import SWEEP_MARK
from fmp_core.storage.lock import locked, result_lock
from fmp_core.sweeps.jobs import stop_leftovers
from fmp_core.sweeps.local import Board, run_local
from sweep_jobs import order, run_all, wait_for, working

DEFENSE = Path(__file__).resolve().parents[2] / "defense"

KILLED = """
import json, sys
from pathlib import Path
from fmp_core.sweeps.jobs import Job
from fmp_core.sweeps.plan import plan
from fmp_core.sweeps.local import run_local
jobs = [Job(**{**job, "folder": Path(job["folder"])}) for job in json.loads(sys.argv[1])]
run_local(jobs, Path("sweeps/s"), [{}], lambda job, outcome: print(job.name, flush=True))
"""


def test_kill_in_the_middle_and_run_again(place: Path) -> None:
    jobs = [working("a"), working("b", 60), working("c")]
    sent = json.dumps([vars(job) for job in jobs], default=str)
    environment = {**os.environ, "PYTHONPATH": str(DEFENSE)}
    with subprocess.Popen([sys.executable, "-c", KILLED, sent], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "r.a\n"
        wait_for(lambda: "b begins" in order(), "the second job did not begin")
        process.send_signal(signal.SIGKILL)
    assert stop_leftovers(Path("sweeps/s")) == 1  # b, which nobody waits for any more
    again = [working("a"), replace(working("b"), settings=jobs[1].settings), working("c")]  # the same jobs, b now quick
    board = Board(again, 1)
    assert [job.method for job in board.left] == ["b", "c"] and board.skipped == 1
    run_local(board.left, Path("sweeps/s"), [{}], board.report)
    assert board.summary() == 0 and order().count("a begins") == 1 and order().count("b ends") == 1


# Stands for a defense of BackdoorBench, which has a temporary folder to remove, and for one that hangs.
TIDY = """
import pathlib, signal, sys, time
def leave(*_): sys.exit(pathlib.Path("temporary").rmdir())
signal.signal(signal.SIGTERM, leave)
pathlib.Path("temporary").mkdir()
time.sleep(60)
"""
STUBBORN = TIDY.replace("SIGTERM, leave", "SIGTERM, signal.SIG_IGN")
CTRL_C = """
import os, pathlib, signal, sys, time
while not pathlib.Path("temporary").exists(): time.sleep(0.05)
os.kill(int(sys.argv[1]), signal.SIGINT)
"""


@pytest.mark.parametrize(("code", "left"), [(TIDY, False), (STUBBORN, True)], ids=["tidy", "stubborn"])
def test_a_job_may_tidy_up_when_the_sweep_is_interrupted(
    place: Path, code: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left:  # after the time it has, a job is killed
        monkeypatch.setattr("fmp_core.sweeps.jobs.GRACE", 0.1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be told to ignore it
    try:
        with subprocess.Popen([sys.executable, "-c", CTRL_C, str(os.getpid())]), pytest.raises(KeyboardInterrupt):
            run_all([working("a", code=code)], workers=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert Path("temporary").exists() == left


def test_what_a_killed_sweep_left_may_tidy_up(place: Path) -> None:
    environment = {**os.environ, SWEEP_MARK: str(Path("sweeps/s").resolve())}
    with subprocess.Popen([sys.executable, "-c", TIDY], env=environment):
        wait_for(Path("temporary").exists, "the job did not begin")
        assert stop_leftovers(Path("sweeps/s")) == 1
    assert not Path("temporary").exists()


def test_a_job_that_waits_for_a_lock_ends_with_the_sweep(place: Path) -> None:
    job = working("a")
    job.folder.parent.mkdir(parents=True, exist_ok=True)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with locked(job.folder.parent, wait=False, name=result_lock(job.folder)), pytest.raises(KeyboardInterrupt):
        run_local([job, working("b", code="raise SystemExit(3)")], Path("sweeps/s"), [{}, {}], interrupted)
    assert not Path("order.txt").exists()
    assert run_all([job])["a"].problem is None  # the next sweep runs it


def test_a_lock_that_cannot_be_had_fails_its_job_alone(place: Path) -> None:
    job = working("a")
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    (job.folder.parent / result_lock(job.folder)).symlink_to("elsewhere")
    ended = run_all([job, working("b")])
    assert "is a link, and was refused" in str(ended["a"].problem) and ended["b"].problem is None
