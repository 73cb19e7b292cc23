"""A script of a checkout finds everything BackdoorBench looks for, and leaves nothing but its results and no process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import run_defense
import torch
from conftest import RECORD, call_fmp
from fmp_core.backdoorbench.install import PROJECT
from fmp_core.backdoorbench.process import Ended, reason_of
from fmp_core.backdoorbench.run import how_it_ended, run_on_record
from fmp_core.backdoorbench.workspace import Job, open_job, workspace
from fmp_core.data.attack_record import read_attack_record
from fmp_core.errors import UserError
from fmp_core.results.read import read_result
from fmp_core.storage.lock import locked, result_lock

BACKSTOP = 900
Tree = Callable[[Path], dict[str, str | None]]


def job(checkout: Path, record: str = RECORD) -> Job:
    return open_job(checkout, "record", record, "data", "cpu")


def run(
    checkout: Path,
    *extra: str,
    defense: str = "echo",
    analysis: str | None = None,
    python: str = sys.executable,
    test_images: int | None = None,
) -> tuple[str, int]:
    return run_on_record(job(checkout), defense, analysis, python, list(extra), test_images)


class Stranger:
    """A class of nobody's library, for records that hold an object of it."""


def test_the_command_runs_a_defense_in_a_small_process_and_leaves_only_its_results(
    checkout: Path, tiny_record: Path, tree: Tree
) -> None:
    renamed = tiny_record.rename(tiny_record.with_name("renamed"))  # its images are stored under the old name
    record, code = tree(renamed), tree(checkout)
    flags = ["--backdoorbench", str(checkout), "--defense", "echo", "--result_file", "renamed/", "--device", "cpu"]
    driver = "import sys, run_defense; print(run_defense.main(sys.argv[1:]), {'torch', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(PROJECT / part) for part in ("record_scripts", "defense"))}
    command = [sys.executable, "-c", driver, *flags]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BACKSTOP)
    assert ran.stdout.splitlines()[-1] == "0 set()", ran.stderr
    results = renamed / "defense" / "echo"
    log = (results / "run_defense.log").read_text()
    assert "ran with cifar10 squeezenet1_0 a name" in log and log.endswith(" s\n") and "exit code 0" in log
    assert "ran with cifar10" in ran.stdout and "echo ended after" in ran.stdout
    assert {path.name for path in results.iterdir()} == {"run_defense.log", "run_defense.json", "defense_result.pt"}
    message, ended = run_on_record(job(checkout, "renamed"), "echo", "names", sys.executable, [])
    assert ended == 0 and "results are below" in message
    assert "--result_file_defense renamed/defense/echo" in (results / "visual_names.log").read_text()
    assert (results / "visual" / "plot.png").is_file()
    assert tree(checkout) == code
    assert {key: value for key, value in tree(renamed).items() if not key.startswith("defense")} == record


def test_a_failure_is_reported_with_its_exit_code_and_last_error(checkout: Path, tiny_record: Path) -> None:
    Path("mine.txt").write_text("0\n")  # named from here, though the script runs elsewhere
    extra = ("--index", "mine.txt", "--num_workers", "1", "--fail", "no such luck")
    message, code = run(checkout, *extra)  # a bare Exception, of which BackdoorBench raises many
    assert code == 1
    assert "echo did not run to its end: exit code 1 (Exception: no such luck); see record" in message
    assert "exit code 1 after" in (tiny_record / "defense" / "echo" / "run_defense.log").read_text()


def test_with_few_test_images_the_final_model_is_tested_on_all(checkout: Path, tiny_record: Path) -> None:
    """The stand-in returns the attacked model, whose figures FMP's own test gives, too."""
    assert call_fmp("--device", "cpu", "--result_file", RECORD, "--selection", "none", "--epochs", "0").code == 0
    own = json.loads((tiny_record / "defense" / "fmp" / "metrics.json").read_text())["before"]
    message, code = run(checkout, "--keep", "yes", defense="counter", test_images=4)
    assert code == 0, message
    assert "tests on [0, 2, 5, 7] [0, 2, 4, 6]" in (tiny_record / "defense" / "counter" / "run_defense.log").read_text()
    assert read_result(tiny_record / "defense" / "counter").metrics == own
    model = tiny_record / "defense" / "counter" / "defense_result.pt"
    content = model.read_bytes()
    model.write_bytes(content + b"another")  # as BackdoorBench's script does that is run directly
    assert read_result(tiny_record / "defense" / "counter").metrics["test_acc"] == 0.5
    model.write_bytes(content)
    assert run(checkout, "--keep", "yes", defense="counter")[1] == 0  # BackdoorBench's own figures count again
    assert read_result(tiny_record / "defense" / "counter").metrics["test_acc"] == 0.5
    with pytest.raises(UserError, match=r"defense_result.pt holds no model; run the defense without --test_images"):
        run(checkout, defense="counter", test_images=4)
    assert read_result(tiny_record / "defense" / "counter").metrics["test_acc"] == 0.5  # what was there is there again
    assert run(checkout, "--keep", "yes", "--nosuch", defense="counter")[0].endswith(
        "see record/badnet_tiny/defense/counter.failed.log"
    )
    assert read_result(tiny_record / "defense" / "counter").metrics["test_acc"] == 0.5
    shutil.rmtree(tiny_record / "defense" / "counter")
    with pytest.raises(UserError, match="holds no model"):
        run(checkout, defense="counter", test_images=4)
    with pytest.raises(UserError, match="of a run with --test_images 4 that did not end; run it again"):
        read_result(tiny_record / "defense" / "counter")


def test_a_defense_that_saves_other_weights_than_it_tests_takes_no_test_images(checkout: Path, tiny_record: Path) -> None:
    for defense, extra in (("npd", []), ("nab", []), ("mcr", []), ("dbd", []), ("anp", ["--pruning_number", "0.1"])):
        with pytest.raises(UserError, match=f"--test_images cannot be used with {defense}, which saves"):
            run(checkout, *extra, defense=defense, test_images=4)


def test_results_that_another_run_writes_are_left_alone(checkout: Path, tiny_record: Path) -> None:
    mine = tiny_record / "defense" / "echo" / "metrics.json"
    with locked(tiny_record / "defense", wait=False, name=result_lock(mine.parent)):
        mine.parent.mkdir(exist_ok=True)
        mine.touch()
        with pytest.raises(UserError, match="Another run of echo writes into the results of this record"):
            run(checkout)
    assert mine.exists()
    assert run(checkout)[1] == 0 and not mine.exists()  # it would be read in place of BackdoorBench's


def test_an_unknown_device_is_refused_before_backdoorbench_starts(checkout: Path, tiny_record: Path) -> None:
    with pytest.raises(UserError, match="--device gpu is not a device"):
        open_job(checkout, "record", RECORD, "data", "gpu")


def test_an_impossible_number_of_test_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_defense.main(["--defense", "ft", "--result_file", "r", "--test_images", "0"])
    assert stop.value.code == 2 and "--test_images must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ('{t}\n  File "a.py", line 1\n    f()\nException: no dataset\n', "Exception: no dataset"),
        (" 50%|##   | 1/2 {t}\n  File\nbox.Unheard: of\nWARNING: later\n", "box.Unheard: of"),
        ("{t}\n  File\nKeyError: 'a'\n\nDuring handling ...\n\n{t}\n  File\nStopIteration\n", "StopIteration"),
        ("{t}\n  File\nRuntimeError: Error(s) in loading state_dict:\n\tsize mismatch\n", "RuntimeError: Error(s) in loading"),
        ("usage: ft.py [-h]\nft.py: error: unrecognized arguments: --epoch 1\n", "ft.py: error: unrecognized arguments"),
        ("loading\nthis dataset is unknown to us\n\n", "this dataset is unknown to us"),
    ],
)
def test_the_reason_of_a_failure_is_found_in_what_was_printed(output: str, reason: str) -> None:
    assert reason_of(output.format(t="Traceback (most recent call last):")).startswith(reason)


def test_what_backdoorbench_cannot_be_given_is_refused_before_it_starts(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    with pytest.raises(UserError, match=r"has no nonsense.py to run; there are counter, echo, sleeper"):
        run(checkout, defense="nonsense")
    with pytest.raises(UserError, match=r"has no visual_cm.py to run; there are names"):
        run(checkout, analysis="cm")
    with pytest.raises(UserError, match="to analyse; run the defense echo first"):
        run(checkout, analysis="names")
    with pytest.raises(UserError, match="--python no/such/python is not a program"):
        run(checkout, python="no/such/python")
    with pytest.raises(UserError, match="is not a BackdoorBench checkout"):
        job(tiny_record)
    for known in ("digits", "a_forks_own"):  # the demo's dataset, which only we know; and one that only the checkout knows
        edit_record(tiny_record, lambda content, name=known: content.update(clean_data=name))
        with pytest.raises(UserError) as refusal:
            job(checkout)
        sentence = "its dataset is digits, and BackdoorBench knows a_forks_own, cifar10. Make a record"
        assert (sentence in str(refusal.value)) == (known == "digits")
    edit_record(tiny_record, lambda content: content.update(clean_data="cifar10", extra=subprocess.Popen))
    with pytest.raises(UserError, match=r"\.Popen \(under 'extra'\), and a record may hold data only"):
        job(checkout)
    edit_record(tiny_record, lambda content: content.update(clean_data="cifar10", extra=Stranger()))
    assert read_attack_record(tiny_record).dataset == "cifar10"  # we make no such object, but BackdoorBench would
    with workspace(job(checkout)) as folder:  # so it gets a file without it
        copied = torch.load(folder / "record" / RECORD / "attack_result.pt", weights_only=False)
        assert "extra" not in copied and copied["data_path"] == "./data/cifar10"


def test_flags_of_backdoorbench_without_two_dashes_get_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--defense", "ft", "--result_file", "r"]
    for wrong in (["--epochs", "1"], ["x.yaml"], ["--data", "d"]):
        with pytest.raises(SystemExit) as stop:
            run_defense.main([*flags, *wrong])
        assert stop.value.code == 2
        assert "flags of BackdoorBench's script go last, after --, as in ... -- --epochs 10" in capsys.readouterr().err
    monkeypatch.setattr(run_defense, "run", lambda args, extra: given.append(extra))
    given: list[list[str]] = []
    assert run_defense.main([*flags, "--", "--epochs", "1", "--", "x"]) == 0 and given == [["--epochs", "1", "--", "x"]]


def test_links_and_other_names_are_followed(checkout: Path, tiny_record: Path) -> None:
    (tiny_record / "attack_result.pt").rename(tiny_record.parents[1] / "stored.pt")
    (tiny_record / "attack_result.pt").symlink_to("../../stored.pt")
    Path("data/cifar10").rename("data/CIFAR-10")
    with workspace(job(checkout)) as folder:
        seen = folder / "record" / RECORD / "attack_result.pt"
        assert seen.is_file() and not seen.is_symlink()
        assert (folder / "data" / "cifar10" / "cifar-10-batches-py" / "test_batch").is_file()


def test_a_record_whose_paths_are_no_paths_is_refused(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    edit_record(tiny_record, lambda content: content["bd_test"]["bd_data_container"].update(data_dict={0: {"other_index": 1}}))
    with pytest.raises(UserError):
        job(checkout)


def test_a_log_that_is_a_link_out_of_the_record_is_refused(checkout: Path, tiny_record: Path, tmp_path: Path) -> None:
    (tiny_record / "defense" / "echo").mkdir(parents=True)
    (tmp_path / "diary").write_text("dear")
    (tiny_record / "defense" / "echo" / "run_defense.log").symlink_to(tmp_path / "diary")
    with pytest.raises(UserError, match="leads out of the record"):
        run(checkout)
    assert (tmp_path / "diary").read_text() == "dear"


def test_a_killed_or_silent_defense_is_no_success(tmp_path: Path) -> None:
    def judge(exit_code: int, started: float | None) -> tuple[str, int]:
        return how_it_ended("ft", Ended(exit_code, 1.0, ""), tmp_path / "run_defense.log", started)

    assert judge(0, 0.0)[1] == 1  # nothing written
    result = tmp_path / "defense_result.pt"
    torch.save({}, result)
    assert judge(0, 0.0)[1] == 0
    assert judge(0, result.stat().st_mtime + 1)[1] == 1  # an earlier run's
    message, code = judge(-9, 0.0)
    assert code == 137 and "killed by SIGKILL (out of memory?)" in message
    assert judge(0, None)[1] == 0  # an analysis writes no such file


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a SIGKILL cannot be passed on, and /proc is needed to look")
@pytest.mark.parametrize(("script", "kind"), [("check_parity.py", signal.SIGTERM), ("run_defense.py", signal.SIGKILL)])
def test_a_killed_command_leaves_no_process_of_backdoorbench_behind(
    checkout: Path, tiny_record: Path, tmp_path: Path, script: str, kind: signal.Signals
) -> None:
    (tiny_record / "defense" / "fmp").mkdir(parents=True)
    (tiny_record / "defense" / "fmp" / "metrics.json").write_text('{"after": {}}')  # check_parity wants FMP to have run
    torch.save({"model": {}}, tiny_record / "defense" / "fmp" / "defense_result.pt")
    pids, temporary = tmp_path / "pids", tmp_path / "temporary"
    temporary.mkdir()
    flags = ["--backdoorbench", str(checkout), "--result_file", RECORD, "--device", "cpu"]
    command = [sys.executable, str(PROJECT / "record_scripts" / script), *flags]
    command += ["--defense", "sleeper"] if script == "run_defense.py" else []
    environment = {**os.environ, "PIDS": str(pids), "TMPDIR": str(temporary), "PYTHONPATH": str(PROJECT / "defense")}
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        _wait(lambda: pids.exists() or process.poll() is not None)
        assert pids.exists(), (tmp_path / "out").read_text()
        head, child, _ = pids.read_text().split()
        process.send_signal(kind)
        code = process.wait(BACKSTOP)
        _wait(lambda: _gone(head) and (kind == signal.SIGKILL or _gone(child)))
        if kind == signal.SIGTERM:
            printed = (tmp_path / "out").read_text()
            assert code == 143 and "check_parity: terminated" in printed and "Traceback" not in printed
            assert "[1/4] FMP reads the record" in printed and "[2/4] BackdoorBench reads" in printed
            assert list(temporary.glob("fmp_*")) == []
    finally:
        process.kill()
        if pids.exists():
            _end_group(int(pids.read_text().split()[0]))


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BACKSTOP
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def _gone(pid: str) -> bool:
    """No such process, or one that only waits to be asked how it ended."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _end_group(head: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head, signal.SIGKILL)
