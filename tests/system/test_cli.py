"""One parser, one way to end, one timer of stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fmp_core.errors import UserError
from fmp_core.system.cli import Parser, Stages, if_it_ends_early, run_main

PROJECT = Path(__file__).parents[2]
SCRIPTS = ["defense/fmp.py", *sorted(f"record_scripts/{path.name}" for path in (PROJECT / "record_scripts").glob("*.py"))]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_names_that_the_terminal_cannot_show_are_escaped(encoding: str) -> None:
    """A folder may be called in no encoding at all. All results were written when the table ended in a traceback."""
    code = "from fmp_core.system.cli import run_main; run_main('fmp', lambda: print('results: caf\\u00e9 \\udce9'))"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "defense"), "PYTHONIOENCODING": encoding}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ran.returncode == 0 and ran.stdout.startswith(b"results: caf") and ran.stdout.endswith(b" \\udce9\n"), ran.stderr


def raising(error: BaseException, stage: str | None = None, words: str | None = None):
    def function() -> None:
        stages = Stages()
        with stages("outer"):
            if stage is None:
                raise error
            with if_it_ends_early("outer words"), if_it_ends_early(words or "inner words"), stages(stage):
                raise error

    return function


def test_flags_are_not_abbreviated_and_a_wrong_one_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    parser = Parser("tool")
    parser.add_argument("--device")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--dev", "cpu"])
    assert stop.value.code == 2
    said = "tool: unrecognized arguments: --dev cpu (did you mean --device?); --help lists the flags.\n"
    assert capsys.readouterr().err == said


def test_a_home_that_shells_leave_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("tool")
    parser.add_argument("--folder")
    parser.add_argument("word")
    given = vars(parser.parse_args(["--folder=~/x=~", "~/y"]))  # a quoted word is meant as it is
    assert given == {"folder": "/home/me/x=~", "word": "~/y"}


def test_a_function_that_returns_gives_its_exit_code():
    assert run_main("tool", lambda: None) == 0
    assert run_main("tool", lambda: 1) == 1


@pytest.mark.parametrize(
    ("function", "code", "sentence"),
    [
        (raising(UserError("p is wrong.")), 2, "p is wrong."),
        (raising(OSError(28, "No space left", "x.pt")), 2, "x.pt failed (No space left); earlier results are unchanged."),
        (
            raising(OSError(28, "No space left", "x.pt"), "writing", "results are partly written"),
            2,
            "x.pt failed (No space left); results are partly written.",
        ),
        (
            raising(KeyboardInterrupt()),
            130,
            "interrupted; earlier results are unchanged. Run the same command again to go on from here.",
        ),
        (
            raising(MemoryError(), "ranking"),
            2,
            "out of memory (ranking); lower --chunk or --memory, or choose another --device; inner words.",
        ),
        (
            raising(MemoryError()),
            2,
            "out of memory (outer); close what else uses it, or choose another --device; earlier results are unchanged.",
        ),
        (
            raising(RuntimeError("DefaultCPUAllocator: can't allocate memory"), "fine-tuning"),
            2,
            "out of memory (fine-tuning); lower --batch_size, or choose another --device; inner words.",
        ),
    ],
)
def test_an_error_ends_in_a_sentence_and_an_exit_code(function, code: int, sentence: str, capsys: pytest.CaptureFixture[str]):
    import torch  # noqa: F401 - its kinds of memory errors are known once it is loaded

    assert run_main("tool", function) == code
    assert capsys.readouterr().err == f"tool: {sentence}\n"


def test_an_error_that_is_nobodys_input_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        run_main("tool", raising(RuntimeError("a bug"), "ranking"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_like_an_interruption_and_cleans_up(number: int, capsys: pytest.CaptureFixture[str]):
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.signal(number, signal.SIG_DFL)  # below nohup it would be ignored
    try:
        assert run_main("tool", work, again="it without --fresh") == 143
        assert cleaned and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert "terminated; earlier results are unchanged. Run it without --fresh again" in capsys.readouterr().err


def test_a_signal_that_makes_an_import_fail_is_an_interruption(capsys: pytest.CaptureFixture[str]):
    def importing() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            raise RecursionError from None  # as numpy does

    def writing() -> None:
        with if_it_ends_early("a table is half written"):
            importing()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a command in the background it is ignored
    try:
        for work, left in ((importing, "earlier results are unchanged"), (writing, "a table is half written")):
            assert run_main("tool", work) == 130
            assert f"tool: interrupted; {left}" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, before)


def test_streams_that_are_closed_and_a_backend_of_a_notebook_are_no_reason_to_fail():
    """As daemons and Jupyter start programs."""
    code = "import sys; sys.path.insert(0, 'defense'); from fmp_core.system.cli import run_main\n"
    code += "def work():\n import matplotlib.figure\n sys.stderr.isatty(), sys.stdout.isatty()\n return 7\n"
    code += "sys.exit(run_main('tool', work))"
    backend = {"MPLBACKEND": "absent"}
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=PROJECT, env={**os.environ, **backend}, check=False).returncode == 7


def test_a_closed_terminal_that_is_to_be_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run_main("tool", lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_who_goes_is_no_error():
    code = "import sys; sys.path.insert(0, 'defense'); from fmp_core.system.cli import run_main\n"
    code += "sys.exit(run_main('tool', lambda: print('x' * 10**6)))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_stages_nest(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 5.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = Stages()
    with stages("fine-tuning"):  # 0 to 10
        with stages("testing"):  # 1 to 3
            pass
        with stages("testing"):  # 4 to 5
            pass
    with stages("testing"):  # 20 to 21
        pass
    assert stages.seconds == {"testing": 4.0, "fine-tuning": 7.0}


def test_cpu_seconds_are_those_of_the_run_not_of_the_process(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 107.0])
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    stages = Stages()
    stages.cpu_elsewhere = 2.0
    assert stages.cpu_seconds() == 9.0


def test_a_stage_that_fails_still_counts(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = Stages()
    with pytest.raises(ValueError) as caught, stages("outer"), stages("inner"):
        raise ValueError
    assert stages.seconds == {"inner": 2.0, "outer": 2.0}
    assert caught.value.stage == "inner"  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered_without_torch(script: str):
    # -X importtime lists what is imported; the time itself depends on the machine, torch is what takes seconds
    done = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded and not {"torch", "pandas", "matplotlib"} & loaded


@pytest.mark.parametrize(("given", "expected"), [({}, "1000 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")])
def test_threads_sleep_rather_than_spin_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    code = "import os, sys; sys.path.insert(0, 'defense'); from fmp_core.system.cli import run_main\n"
    code += "run_main('tool', lambda: print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY')))\n"
    code += "assert 'torch' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment.update(given)
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == expected, ran.stderr
