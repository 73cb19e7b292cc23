"""What a sweep may take for its own result: not what something else wrote there, nor what was made of other files."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fmp_core.results.read import STAMP, read_result
from fmp_core.sweeps.jobs import Job, finished, run, settings_hash
from fmp_core.sweeps.local import run_local
from fmp_core.sweeps.plan import plan
from fmp_core.sweeps.slurm import _on_node
from sweep_jobs import WORK, order, sweep_of, working

SEEDED = WORK.replace('"test_acc": 0.9', '"test_acc": float(sys.argv[3])')


def bb_job(seed: int, accuracy: float, seconds: float = 0) -> Job:
    """A run of BackdoorBench's ft, whose result for another seed than 0 lies beside."""
    place = Path("record/r/defense")
    command = (sys.executable, "-c", SEEDED, str(place / "ft"), str(seconds), str(accuracy))
    folder = place / f"ft-s{seed}" if seed else place / "ft"
    return Job("r", "backdoorbench", "ft", seed, folder, command, {"seed": seed}, writes=place / "ft")


def test_a_run_by_hand_is_not_taken_for_the_sweeps(place: Path) -> None:
    job = working("a")
    assert run(job, Path("s"), {}).problem is None and finished(job)
    after = {"test_acc": 0.2, "test_asr": 1.0, "test_ra": 0.0}
    (job.folder / "metrics.json").write_text(json.dumps({"after": after, "seed": 5}))
    result = read_result(job.folder)
    assert finished(job) is None and (result.seed, result.method, result.metrics["test_acc"]) == (5, None, 0.2)


def test_two_sweeps_do_not_mix_results_of_one_defense(place: Path) -> None:
    """BB writes both into defense/ft; each sweep has its own folder."""
    assert run(bb_job(0, 0.9), Path("sweeps/old"), {}).problem is None
    jobs = {Path("sweeps/a"): bb_job(1, 0.11, 0.5), Path("sweeps/b"): bb_job(2, 0.22, 0.5)}
    threads = [threading.Thread(target=run, args=(job, sweep, {})) for sweep, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {job.seed: finished(job) for job in (bb_job(0, 0.9), *jobs.values())}
    accuracies = {seed: outcome.result.metrics["test_acc"] for seed, outcome in found.items() if outcome and outcome.result}
    assert accuracies == {0: 0.9, 1: 0.11, 2: 0.22}
    assert order() == ["ft begins", "ft ends"] * 3  # one after the other


def test_what_a_killed_run_put_aside_needs_no_new_run(place: Path) -> None:
    job = bb_job(0, 0.9)
    assert run(job, Path("s"), {}).problem is None
    job.folder.rename(job.folder.with_name(".ft.aside"))  # by a run of another seed, which was killed
    outcome = run(job, Path("s"), {})
    assert outcome.result is not None and outcome.result.stamped and order() == ["ft begins", "ft ends"]


def test_a_file_that_a_setting_names_counts_by_its_content(place: Path) -> None:
    Path("idx.txt").write_text("1\n")
    job = Job("r", "ours", "a", 0, working("a").folder, working("a").command, {"index": "idx.txt"})
    assert run(job, Path("s"), {}).problem is None and finished(job)
    Path("idx.txt").write_text("2\n")
    assert finished(job) is None


def test_a_long_setting_is_no_file(place: Path) -> None:
    long = replace(working("a"), settings={"mean": "0.5," * 100})
    assert settings_hash(long) == settings_hash(replace(long, settings={"mean": "0.5," * 100})) != settings_hash(working("a"))


def sees(*names: str) -> Job:
    """A job that leaves a file with the values of these environment variables."""
    code = f"{WORK}\nimport os\npathlib.Path('seen.txt').write_text(' '.join(os.environ.get(n, '-') for n in {names}))"
    return working("a", code=code)


def test_a_job_gets_the_gpu_and_threads_of_its_slot(place: Path) -> None:
    slot = {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "5"}
    run_local([sees(*slot)], Path("sweeps/s"), [slot], lambda job, outcome: None)
    assert Path("seen.txt").read_text() == "3 5"


def test_a_job_on_a_node_has_as_many_threads_as_slurm_gave_cpus(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert _on_node(sees("OMP_NUM_THREADS", "MKL_NUM_THREADS"), sweep_of()).problem is None
    assert Path("seen.txt").read_text() == "7 7"


def test_a_record_that_changes_during_a_run_is_another_one(place: Path) -> None:
    code = "pathlib = __import__('pathlib'); pathlib.Path('record/r/attack_result.pt').write_bytes(b'remade')\n" + WORK
    job = working("a", code=code)
    assert run(job, Path("s"), {}).problem is None and (job.folder / STAMP).is_file()
    assert finished(job) is None


def test_a_defense_that_saves_other_weights_tests_on_all_images(place: Path) -> None:
    (place / "bb" / "defense").mkdir(parents=True)
    for name in ("ft", "npd"):
        (place / "bb" / "defense" / f"{name}.py").touch()
    jobs = plan(sweep_of(defenses=["ft", "npd"], backdoorbench=str(place / "bb"), backdoorbench_test_images=50))
    assert ["--test_images" in job.command for job in jobs] == [True, False]


def test_a_result_without_its_model_is_not_done(place: Path) -> None:
    job = working("a")
    assert run(job, Path("s"), {}).problem is None and finished(job)
    (job.folder / "defense_result.pt").unlink()
    assert finished(job) is None
