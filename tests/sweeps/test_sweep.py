"""Sweeps: what a sweep file asks for, the queue's order, what is skipped, and what a kill leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import sweep as script
from conftest import REAL_MODEL, RECORD, build_workplace
from fmp_core.errors import UserError
from fmp_core.storage.lock import locked
from fmp_core.sweeps.jobs import Job, Outcome, finished, run
from fmp_core.sweeps.local import Board, local_slots, may_start, readable, run_local
from fmp_core.sweeps.plan import plan
from fmp_core.sweeps.slurm import run_submitit, waves
from sweep_jobs import LEAVING, WORK, order, run_all, sweep_of, working

DEFENSE = Path(__file__).resolve().parents[2] / "defense"


def test_a_record_made_with_other_settings_stops_the_sweep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "s.yaml").write_text("records: [{name: r, dataset: digits}]\ndefenses: [fmp]\n")
    (place / "record" / "r" / "sweep.json").write_text('{"hash": "other"}')
    assert script.main(["s.yaml"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


def test_a_record_that_another_sweep_made_meanwhile_is_not_taken(place: Path) -> None:
    """Both began before there was one; this one waited for the other."""
    (job, *_) = plan(sweep_of(records=[{"name": "r", "dataset": "digits"}]))
    (place / "record" / "r" / "sweep.json").write_text('{"hash": "other"}')
    assert "was made with other settings" in str(run(job, place / "sweeps", {}).problem)


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(UserError, match="p is an empty list"):
        plan(sweep_of(defenses=[{"defense": "fmp", "p": []}]))


def test_a_record_that_is_missing_stops_the_sweep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "s.yaml").write_text("records: [r, rr]\ndefenses: [fmp]\n")
    assert script.main(["s.yaml", "--dry_run"]) == 2
    assert "record/rr holds no attack record; check the name, and record_root" in capsys.readouterr().err


def test_a_failed_job_stops_no_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [working("a"), working("b", code="import sys; print('something broke'); sys.exit(3)"), working("c")]
    board = Board(jobs, 1)
    run_local(board.left, Path("sweeps/s"), [{}], board.report)
    assert board.summary() == 1
    printed = capsys.readouterr()
    assert "2 of 3 jobs done (0 were done before), 1 failed" in printed.out
    assert "failed: r.b: exit code 3: something broke (log: sweeps/s/logs/r.b.log)" in printed.err
    assert "[2/3] r.b" in printed.out and "(2 left, about " in printed.out


def test_what_is_done_is_skipped_and_what_changed_is_not(place: Path) -> None:
    job = working("a")
    assert finished(job) is None
    assert run_all([job])["a"].result is not None
    done = finished(job)
    assert done is not None and done.result is not None and done.result.metrics["test_acc"] == 0.9
    assert run_all([job])["a"].problem is None and len(order()) == 2
    assert finished(working("a", seconds=0.01)) is None  # other settings
    (job.folder / "metrics.json").write_text("{")
    assert finished(job) is None  # not whole
    run_all([job])
    (place / "record" / "r" / "attack_result.pt").write_bytes(b"another model")
    assert finished(job) is None


def test_a_job_that_leaves_no_result_has_failed(place: Path) -> None:
    ended = run_all([working("a", code="pass"), working("b", code="import time; time.sleep(60)")], timeout=1)
    assert "holds no metrics.json" in str(ended["a"].problem)
    assert str(ended["b"].problem).startswith("stopped after 1 s: it printed nothing")


def test_a_record_in_a_folder_of_records(place: Path) -> None:
    (place / "record" / "r").rename(place / "record" / "nested")
    (place / "record" / "r").mkdir()
    (place / "record" / "nested").rename(place / "record" / "r" / "x")
    folder = Path("record/r/x/defense/a")
    job = replace(working("a"), record="r/x", folder=folder, command=(sys.executable, "-c", WORK, str(folder), "0"))
    assert run_all([job])["a"].problem is None and Path("sweeps/s/logs/r_x.a.log").is_file()


def test_siblings_wait_for_the_ranking(place: Path) -> None:
    jobs = [
        working("lead", 0.5, shared_work="k"),
        working("x", shared_work="k"),
        working("free"),
        working("y", shared_work="k"),
    ]
    run_all(jobs, workers=3)
    log = order()
    assert max(log.index("x begins"), log.index("y begins")) > log.index("lead ends")
    assert log.index("free ends") < log.index("lead ends")  # it had no reason to wait


def test_a_failed_leader_is_followed_by_another(place: Path) -> None:
    jobs = [
        working("lead", code="raise SystemExit(1)", shared_work="k"),
        working("x", 0.2, shared_work="k"),
        working("y", shared_work="k"),
    ]
    ended = run_all(jobs)
    assert ended["lead"].problem and not ended["x"].problem and not ended["y"].problem
    assert order() == ["x begins", "x ends", "y begins", "y ends"]


def test_defenses_wait_for_their_record(place: Path) -> None:
    record = Job("r", "record", "record", None, Path("record/r"), ("make",), {})
    job = working("a")
    assert may_start(record, [job], [], set())
    assert not may_start(job, [record], [], set()) and not may_start(job, [], [record], set()) and may_start(job, [], [], set())


def test_a_record_that_could_not_be_made_fails_its_defenses(place: Path) -> None:
    folder = Path("record/new")
    record = Job("new", "record", "record", None, folder, (sys.executable, "-c", "raise SystemExit(2)"), {})
    command = (sys.executable, "-c", WORK, str(folder / "defense" / "a"), "0")
    job = Job("new", "ours", "a", 0, folder / "defense" / "a", command, {})
    ended = run_all([record, job])
    assert "exit code 2" in str(ended["new"].problem) and "no attack record in record/new" in str(ended["a"].problem)


def test_results_of_backdoorbench_are_kept_apart_by_seed(place: Path) -> None:
    """BB always writes defense/ft; a result that was there before survives a run under another name."""
    writes = Path("record/r/defense/ft")
    writes.mkdir(parents=True)
    (writes / "mine.txt").touch()
    command = (sys.executable, "-c", WORK, str(writes), "0.2")
    results = {name: Path("record/r/defense") / name for name in ("ft-s1", "ft-s2", "ft")}
    jobs = {
        name: Job("r", "backdoorbench", "ft", seed, folder, command, {"seed": seed}, writes=writes)
        for seed, (name, folder) in enumerate(results.items())
    }
    ended = run_all([jobs["ft-s1"], jobs["ft-s2"]], workers=2)
    assert not any(outcome.problem for outcome in ended.values()) and order()[1] == "ft ends"  # one after the other
    assert (writes / "mine.txt").exists() and not (writes / "metrics.json").exists()
    assert all((results[name] / "metrics.json").exists() and finished(jobs[name]) for name in ("ft-s1", "ft-s2"))
    code = """
import sys, pathlib
log = pathlib.Path(sys.argv[1], "bb.log")
log.parent.mkdir()
log.touch()
print(f"it broke; see {log.absolute()} and {log}")
sys.exit(1)
"""
    failing = Job("r", "backdoorbench", "ft", 2, writes, (sys.executable, "-c", code, str(writes)), {}, writes=writes)
    problem, moved = str(run_all([failing])["ft"].problem), "sweeps/s/failed/r.ft/bb.log"
    assert problem.startswith(f"exit code 1: it broke; see {moved} and {moved} (log: ") and Path(moved).exists()
    assert "sweeps/s/failed/r.ft" in Path("sweeps/s/logs/r.ft.log").read_text() and (writes / "mine.txt").exists()
    assert Path("sweeps/s/failed/r.ft/bb.log").exists() and not (writes / "bb.log").exists()
    assert not run_all([jobs["ft"]])["ft"].problem and not (writes / "mine.txt").exists()  # now it was asked for
    assert {path.name for path in writes.parent.glob(".*")} == {".ft.lock"}


def test_a_killed_run_of_backdoorbench_is_cleared_away(place: Path) -> None:
    writes, aside = Path("record/r/defense/ft"), Path("record/r/defense/.ft.aside")
    for folder, name in ((writes, "half.txt"), (aside, "mine.txt")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    command = (sys.executable, "-c", WORK, str(writes), "0")
    outcome = run(Job("r", "backdoorbench", "ft", 1, writes.with_name("ft-s1"), command, {}, writes=writes), Path("s"), {})
    assert outcome.problem is None and not aside.exists()
    assert (writes / "mine.txt").exists() and not (writes / "half.txt").exists()


def test_one_sweep_at_a_time(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "s.yaml").write_text("records: [r]\ndefenses: [fmp]\n")
    with locked(Path("sweeps/s"), wait=False, name="lock"):
        assert script.main(["s.yaml"]) == 2
    assert "The sweep in sweeps/s is running already" in capsys.readouterr().err


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [slot["OMP_NUM_THREADS"] for slot in local_slots("cpu", 4)] == ["2"] * 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="no CUDA device"):
        local_slots("cuda", 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots("auto", 1)] == ["3", "5"]
    several = local_slots("auto", 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in several] == ["3", "5", "3", "5"]
    assert {slot["OMP_NUM_THREADS"] for slot in several} == {"2"}  # eight cores, four jobs
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots("cuda:1", 1)] == ["5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local_slots("cuda", 1, processes=2)] == ["3,5"]
    with pytest.raises(UserError, match=r"device is cuda:2, but this machine has 2 CUDA"):
        local_slots("cuda:2", 1)
    with pytest.raises(UserError, match="processes is 2, one for each GPU of a job, but device cuda:0 has 1"):
        local_slots("cuda:0", 1, processes=2)
    assert all("--device cuda " in " ".join([*job.command, ""]) for job in plan(sweep_of(device="cuda:1")))


def test_help_imports_neither_torch_nor_pandas() -> None:
    code = "import sys, sweep, collect, paper_tables; sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": f"{DEFENSE}:{DEFENSE.parent / 'record_scripts'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_times_are_readable() -> None:
    assert [readable(x) for x in (3.2, 99, 600, 36000)] == ["3 s", "99 s", "10 min", "10.0 h"]
    assert readable(Board([], 1).eta()) == "an unknown time"


def test_waves_for_slurm() -> None:
    record = Job("n", "record", "record", None, Path("record/n"), ("make",), {})
    jobs = [record, working("lead", shared_work="k"), working("x", shared_work="k"), working("free")]
    assert [[job.folder.name for job in wave] for wave in waves(jobs)] == [["n"], ["lead", "free"], ["x"]]
    place = Path("record/r/defense/ft")
    seeds = [working(name, writes=place) for name in ("ft", "ft-s1", "ft-s2")]  # none waits for another with a GPU in its hands
    assert [[job.folder.name for job in wave] for wave in waves([*seeds, *jobs])] == [
        ["n"], ["ft", "lead", "free"], ["ft-s1", "x"], ["ft-s2"]
    ]  # fmt: skip


def test_a_job_that_slurm_ends_leaves_its_files_in_order(place: Path) -> None:
    pytest.importorskip("submitit")
    ended: list[Outcome] = []
    code = LEAVING + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"  # to submitit's process, as scancel does
    run_submitit([working("a", code=code)], sweep_of(), lambda _, outcome: ended.append(outcome), "local", poll=0.2)
    assert Path("left in order").exists() and "ended by SIGTERM" in str(ended[0].problem)


def test_submitits_own_processes_run_a_sweep(place: Path) -> None:
    pytest.importorskip("submitit")
    ended: dict[str, Outcome] = {}
    jobs = [working("a", shared_work="k"), working("b", code="raise SystemExit(4)"), working("x", shared_work="k")]
    sweep = sweep_of(slurm={"partition": "debug", "time": 5, "cpus": 1})
    run_submitit(jobs, sweep, lambda job, outcome: ended.update({job.folder.name: outcome}), "local", poll=0.2)
    assert set(ended) == {"a", "b", "x"} and "exit code 4" in str(ended["b"].problem)
    assert finished(jobs[0]) and finished(jobs[2]) and order() == ["a begins", "a ends", "x begins", "x ends"]


def test_a_real_sweep_is_not_rerun_for_a_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"records: [{RECORD}]\ndefenses: [ft-only]\nours: {{epochs: 0, ratio: 0.2, report: REPORT}}\ndevice: cpu\n"
    for report, says in ((False, "1 of 1 jobs done (0 were done before)"), (True, "(1 were done before)")):
        (workplace / "s.yaml").write_text(text.replace("REPORT", str(report)))
        assert script.main(["s.yaml"]) == 0
        assert says in capsys.readouterr().out


@pytest.mark.slow  # four runs of the program, one of which searches for triggers towards ten classes
def test_a_real_sweep_does_shared_work_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two jobs with the paper's preset one ranks, of two strong ones one searches for triggers, though all run at once."""
    build_workplace(tmp_path, REAL_MODEL, batch_size=30)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(
        textwrap.dedent(f"""
        records: [{RECORD}]
        defenses:
          - {{defense: fmp, p: [32, 64]}}
          - {{defense: fmp, name: strong, preset: strong, budget: [0.01, 0.1]}}
        ours: {{epochs: 0, frg_samples: 1, ratio: 1.0, test_images: 2, report: False}}
        device: cpu
        workers: 4
        """)
    )
    assert script.main(["s.yaml"]) == 0
    assert "4 of 4 jobs done" in capsys.readouterr().out

    def logs(*names: str) -> list[str]:
        return [(tmp_path / "sweeps" / "s" / "logs" / f"{RECORD}.{name}.log").read_text() for name in names]

    paper, strong = logs("fmp-p32", "fmp-p64"), logs("strong-budget0.01", "strong-budget0.1")
    assert sum("feature maps read from" in log for log in paper) == 1
    assert sum("triggers is read from the cache" in log for log in strong) == 1
