"""What a sweep's keys limit: how long a job may take, and what it may use of the machine; and how long the rest will take."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sweep as script
from fmp_core.sweeps.jobs import Outcome
from fmp_core.sweeps.local import Board, local_slots
from fmp_core.sweeps.plan import plan
from fmp_core.sweeps.slurm import _await, _on_node, _parameters
from sweep_jobs import sweep_of, working

PLACES = {"record_root": "my/records", "dataset_path": "my/data"}


def test_the_timeout_of_a_sweep_file_ends_a_job(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """... which would otherwise say that the record holds no model."""
    (place / "s.yaml").write_text("records: [r]\ndefenses: [ft-only]\ndevice: cpu\ntimeout: 0.01\n")
    assert script.main(["s.yaml"]) == 1
    assert "failed: r.ft-only: stopped after 1 s" in capsys.readouterr().err


def test_the_timeout_of_a_sweep_file_ends_a_job_on_a_node(place: Path) -> None:
    job = working("a", code="import time; time.sleep(60)")
    assert str(_on_node(job, sweep_of(timeout=0.01)).problem).startswith("stopped after 1 s")


def test_the_processes_of_a_sweep_file_need_as_many_gpus(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (place / "s.yaml").write_text("records: [r]\ndefenses: [ft-only]\ndevice: cuda\nprocesses: 3\n")
    assert script.main(["s.yaml"]) == 2
    assert "processes is 3, one for each GPU of a job, but device cuda has 2" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "threads"), [("", "4"), ("3", "3"), ("3,2", "3"), ("16", "4"), ("all", "4")])
def test_a_job_takes_no_more_threads_than_the_sweep_may(asked: str, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert [slot["OMP_NUM_THREADS"] for slot in local_slots("cpu", 2)] == [threads] * 2


def test_visible_gpus_are_those_that_cuda_sees_and_parts_of_gpus_one_to_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(visible: str, count: int) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots("auto", 1)]

    assert seen("0,1,-1,2", 2) == ["0", "1"]
    assert seen("MIG-a,MIG-b", 1) == ["MIG-a", "MIG-b"]


def test_every_job_reads_and_writes_where_the_sweep_file_says(place: Path) -> None:
    (place / "bb" / "defense").mkdir(parents=True)
    (place / "bb" / "defense" / "ft.py").touch()
    records = [{"dataset": "cifar10"}]
    jobs = plan(sweep_of(records=records, defenses=["fmp", "ft"], backdoorbench="bb", **PLACES))
    assert [job.kind for job in jobs] == ["record", "ours", "backdoorbench"]
    for job in jobs:
        given = {name: job.command[job.command.index(f"--{name}") + 1] for name in (*PLACES, "device")}
        assert given == {**PLACES, "device": "cpu"}, job.kind
        assert job.folder.is_relative_to("my/records/badnet_cifar10")


def test_the_time_left_is_that_of_ended_jobs_of_the_same_method() -> None:
    """Of a method of which none has ended, the mean of all; several jobs run at a time, if so many are left."""
    ended = [("a", 10.0), ("a", 30.0), ("b", 100.0)]
    left = [working("a", 1), working("a", 2), working("b", 3), working("c", 4)]
    for workers, expected in ((1, 20 + 20 + 100 + 140 / 3), (2, (20 + 20 + 100 + 140 / 3) / 2), (9, (140 + 140 / 3) / 4)):
        board = Board([], workers)
        for number, (name, seconds) in enumerate(ended):
            job = working(name, 10 + number)
            board.left = [job]
            board.report(job, Outcome(seconds))
        board.left = list(left)
        assert board.eta() == pytest.approx(expected)


def test_a_wave_waits_for_all_that_ended_before_it_however_they_ended() -> None:
    before: Any = [SimpleNamespace(job_id=number) for number in ("31_0", "31_1", "40_0")]
    sweep = sweep_of(slurm={"partition": "gpu", "at_once": 4})
    first, second = _parameters(sweep, "slurm", []), _parameters(sweep, "slurm", before)
    assert first == {"timeout_min": 600, "slurm_partition": "gpu", "slurm_array_parallelism": 4, "name": "s"}
    assert second == {**first, "slurm_additional_parameters": {"dependency": "afterany:31:40"}}
    assert _parameters(sweep, "local", before) == {"timeout_min": 600, "name": "s"}


def awaited(queued: list[set[str] | None], done: list[bool]) -> list[Outcome]:
    """How a job, number 7, is reported if squeue and its file say so, look after look."""
    looks, ends, ended = iter(queued), iter(done), list[Outcome]()
    handle = SimpleNamespace(
        job_id="7", done=lambda: next(ends), result=lambda: Outcome(5.0), paths=SimpleNamespace(stderr="e")
    )
    _await([(working("a"), handle)], lambda _, outcome: ended.append(outcome), 0, lambda: next(looks))
    return ended


def test_a_job_that_left_the_queue_has_time_to_leave_its_result() -> None:
    assert awaited([{"7"}, {"7"}, set(), set()], [False, True, False, True]) == [Outcome(5.0)]  # requeued; then done
    assert awaited([{"7"}, None, set(), None, set()], [False] * 5) == [Outcome(0, "Slurm ended it without a result (log: e)")]


def test_a_job_that_squeue_missed_once_may_leave_the_queue_as_any_other() -> None:
    assert awaited([set(), {"7"}, set(), set()], [False, False, False, True]) == [Outcome(5.0)]
