"""A run that is killed, interrupted, starved or doubled loses nothing: run again, it ends with the same files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import fmp
import pytest
import torch
from command import RESULTS, SHORT
from conftest import RECORD, call_fmp
from driver import Run
from fmp_core.frg import scorer
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.frg.scores import Scores
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.results import run_folder
from torch import Tensor
from toy import Plain
from toy_cases import Normalised, toy_case

FLAGS = ["--device", "cpu", "--result_file", RECORD, "--frg_samples", "2", "--p", "8", "--epochs", "3", "--ratio", "0.4"]
FLAGS += ["--batch_size", "8", "--chunk", "16", "--amp", "False", "--frequency_save", "2", "--report", "False"]
FLAGS += ["--interpolate", "0.25"]


def start(root: Path, *flags: str, **when: Any) -> Run:
    return Run(root, *FLAGS, *flags, **when)


def final(root: Path) -> dict[str, Any]:
    """What a complete run leaves, without what may differ: times, the commit, the log's name."""
    files: dict[str, Any] = {}
    for path in sorted((root / RESULTS).rglob("*")):
        name = path.relative_to(root / RESULTS).as_posix()
        if path.is_file() and path.suffix != ".log" and name != "report.html":  # the page shows the times
            files[name] = path.read_bytes()
    metrics = json.loads(files["metrics.json"])
    of_the_run = ("seconds", "reused", "cpu_seconds", "versions")
    files["metrics.json"] = {key: value for key, value in metrics.items() if key not in of_the_run}
    for name in files:
        if name.endswith(".pt"):  # a zip archive holds its own name, which was temporary
            files[name] = torch.load(root / RESULTS / name, weights_only=True)
    return files


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


class Whole(NamedTuple):
    """What a run left that nothing disturbed, and how many files it wrote, one after the other."""

    files: dict[str, Any]
    written: int


@pytest.fixture(scope="module")
def whole(workplace_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole") / "workplace"
    shutil.copytree(workplace_template, root)
    run = start(root)
    ran = run.finish()
    assert ran.code == 0, ran.err
    return Whole(final(root), run.files_written())


def states(root: Path) -> list[Path]:
    """Checkpoints of ranking and of fine-tuning."""
    return [*(root / RESULTS / "cache").glob("ranking_*.pt"), *(root / RESULTS / "checkpoint").glob("interrupted.pt")]


def ends_with_the_same_files(root: Path, expected: dict[str, Any]) -> None:
    ran = start(root).finish()
    assert ran.code == 0, ran.err
    found = final(root)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same(found[name], expected[name])] == []
    assert not states(root)


def test_killed_again_and_again_a_run_ends_with_the_same_files(whole: Whole, workplace: Path):
    """``kill -9`` in the ranking, in fine-tuning and while results are written, one after the other in the same folder."""
    for hold_at, kind in (("ranking_", "ranking_"), ("interrupted", "interrupted"), ("defense_result", "interrupted")):
        process = start(workplace, hold_at=hold_at)
        process.signal(signal.SIGKILL)
        assert process.finish().code == -signal.SIGKILL
        (state,) = states(workplace)
        assert state.name.startswith(kind)
    assert start(workplace, kill_at=6).finish().code == -signal.SIGKILL
    ends_with_the_same_files(workplace, whole.files)


@pytest.mark.slow
def test_killed_at_any_file_a_run_ends_with_the_same_files(whole: Whole, workplace: Path):
    for kill_at in range(1, whole.written + 1):
        shutil.rmtree(workplace / "record" / RECORD / "defense", ignore_errors=True)
        for at in (kill_at, 1 + kill_at // 2):
            assert start(workplace, kill_at=at).finish().code in (-signal.SIGKILL, 0)
        ends_with_the_same_files(workplace, whole.files)


RANKING = ["--epochs", "0"]
TRAINING = ["--selection", "none"]


@pytest.mark.parametrize(
    "flags, hold_at, stop, code, word, stage",
    [
        (RANKING, "ranking_", signal.SIGINT, 130, "interrupted", "ranking"),
        (TRAINING, "interrupted", signal.SIGTERM, 143, "terminated", "fine-tuning"),
    ],
)
def test_a_signal_ends_a_run_with_a_message_and_the_next_goes_on(
    flags: list[str], hold_at: str, stop: signal.Signals, code: int, word: str, stage: str, workplace: Path
):
    process = start(workplace, *flags, hold_at=hold_at)
    process.signal(stop)
    ran = process.finish()
    assert ran.code == code and "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].startswith(f"fmp: {word}; earlier results are unchanged. Run the same command again")
    assert len(states(workplace)) == 1
    again = call_fmp(*FLAGS, *flags)
    assert again.code == 0 and re.search("continues? after|goes on", again.err), again.err
    assert not states(workplace)
    assert json.loads((workplace / RESULTS / "metrics.json").read_text())["reused"] == [stage]


def test_killed_after_the_last_epoch_a_run_has_its_predictions_too(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    assert call_fmp(*FLAGS, *TRAINING).code == 0
    expected = final(workplace)
    shutil.rmtree(workplace / RESULTS)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_defense_result", killed)
        assert call_fmp(*FLAGS, *TRAINING, "--frequency_save", "0").code == 130
    assert [path.name for path in states(workplace)] == ["interrupted.pt"]
    assert call_fmp(*FLAGS, *TRAINING, "--frequency_save", "0").code == 0
    found = final(workplace)
    compared = {"predictions.csv", "fmp_df.csv", "feature_maps.csv", "defense_result.pt"}
    assert compared <= set(found) and all(same(found[name], expected[name]) for name in compared)


def test_a_run_that_ends_early_says_what_lies_there(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    flags = [*FLAGS, *RANKING, "--fresh"]
    assert call_fmp(*flags, "--ratio", "0.5").code == 0

    def results() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (workplace / RESULTS).iterdir() if path.is_file()}

    expected = results()
    for where, name, said in (
        (fmp, "prune_feature_maps", "earlier results are unchanged"),
        (run_folder, "write_plots", "new results are partly written"),
        (fmp, "write_report", "new results are partly written"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            ran = call_fmp(*flags, "--report", "True")
        last = f"fmp: interrupted; {said}. Run the same command without --fresh again to go on from here."
        assert ran.code == 130 and ran.err.splitlines()[-1] == last
        if name == "prune_feature_maps":
            assert results() == expected
    assert results()["index.txt"] != expected["index.txt"]


def interrupted_in_training(root: Path) -> Path:
    """The state that a run leaves which was killed after an epoch of fine-tuning."""
    process = start(root, *TRAINING, hold_at="interrupted")
    process.signal(signal.SIGKILL)
    process.finish()
    (state,) = states(root)
    return state


def test_a_checkpoint_of_other_settings_is_refused_and_fresh_starts_again(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    state = interrupted_in_training(workplace)
    before = state.read_bytes()
    for flags, said in ((["--lr", "0.05"], "lr 0.01 (now 0.05)"), (["--p", "16"], "p 8 (now 16)")):
        ran = call_fmp(*FLAGS, *TRAINING, *flags)
        assert ran.code == 2 and "interrupted.pt was made with" in ran.err and said in ran.err
        assert state.read_bytes() == before
    monkeypatch.setattr("fmp_core.repair.finetune.REPAIR_CODE", "another")
    assert "was made with digest of model, images, code and versions" in call_fmp(*FLAGS, *TRAINING).err
    assert call_fmp(*FLAGS, "--epochs", "0").code == 0  # trains nothing, so it loses nothing
    assert state.read_bytes() == before
    assert call_fmp(*FLAGS, *TRAINING, "--lr", "0.05", "--fresh", "--epochs", "1").code == 0
    assert not states(workplace)


def test_fine_tuning_goes_on_under_other_flags_that_decide_nothing(workplace: Path):
    """A report, another log or a wait are no reason to train again."""
    interrupted_in_training(workplace)
    flags = ["--report", "True", "--wait", "--log", "logs", "--tensorboard", "False", "--frequency_save", "0", "--quiet"]
    ran = call_fmp(*FLAGS, *TRAINING, *flags, "--log_level", "debug")
    assert ran.code == 0, ran.err
    (log,) = (workplace / "logs").glob("*.log")
    assert "continues after epoch 1 of 3" in log.read_text()
    assert (workplace / RESULTS / "report.html").is_file() and not states(workplace)


def test_a_second_run_is_told_of_the_first_or_waits_for_it(workplace: Path):
    first = start(workplace, *TRAINING, hold_at="interrupted")
    try:
        second = call_fmp(*FLAGS, *TRAINING)
        assert second.code == 2 and second.err.startswith("fmp: Another run works in record/badnet_tiny/defense/fmp; ")
        assert second.err.count("\n") == 1
        third = start(workplace, *TRAINING, "--wait")
        assert not third.ends_within(2.0)
    finally:
        first.signal(signal.SIGKILL)  # no lock outlives its process
    first.finish()
    ran = third.finish()
    assert ran.code == 0 and "continues after epoch" in ran.err
    assert not states(workplace)


def score(model: Normalised, images: Tensor, labels: Tensor, rows: int | None = None) -> Scores:
    layers = trace_conv_layers(model.network, images[:1])
    return FeatureMapScorer(model, layers, images, labels, FrgSettings(0.1), batching=Batching(rows)).score()


@pytest.mark.parametrize("least", [2, 32])
def test_out_of_memory_halves_the_batch_and_goes_on(least: int, monkeypatch: pytest.MonkeyPatch):
    """An allocator that refuses more than 16 images at a time, as a small GPU would; also where a CPU has 32 threads."""
    seen: list[int] = []
    genuine = scorer.SharedForward

    def limited(model: Any, layers: Any, images: Any, start: Any, copies: int = 1, *more: Any) -> Any:
        seen.append(len(images) * copies)
        if seen[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(model, layers, images, start, copies, *more)

    expected = score(*toy_case(Plain, count=7), rows=64)
    monkeypatch.setattr(scorer, "SharedForward", limited)
    monkeypatch.setattr(scorer, "row_multiple", lambda _device: least)
    found = score(*toy_case(Plain, count=7), rows=64)
    assert len(seen) == 3 and seen[0] > seen[1] > 16 >= seen[2]
    assert torch.equal(found.correct, expected.correct) and torch.equal(found.margin, expected.margin)


def test_memory_that_never_suffices_is_one_sentence(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "SharedForward", refuses)
    ran = call_fmp(*SHORT, "--selection", "frg")
    assert ran.code == 2 and ran.err.splitlines()[-1].startswith("fmp: out of memory (ranking); lower --chunk or")


def test_a_leader_that_is_refused_ends_the_others_with_a_message(workplace: Path):
    """Another run holds the result folder: the first process says so and ends, and the second one after it."""
    first = start(workplace, *TRAINING, hold_at="interrupted")
    try:
        workers = [start(workplace, *RANKING, environment=place) for place in _places()]
        leader, other = (worker.finish() for worker in workers)
    finally:
        first.signal(signal.SIGKILL)
        first.finish()
    assert leader.code == 2 and "Another run works in" in leader.err
    assert other.code == 2 and "Another process of torchrun ended early" in other.err and "Traceback" not in other.err


def _places() -> list[dict[str, str]]:
    """What torchrun would put into the environment of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def test_a_worker_that_dies_ends_the_others_with_a_message(workplace: Path):
    """Two processes rank together; one is killed. The other ends by itself, and says what happened."""
    first, second = _places()
    leader = start(workplace, environment=first)
    worker = start(workplace, environment=second, hold_at="ranking_")
    worker.signal(signal.SIGKILL)
    worker.finish()
    ran = leader.finish()
    assert ran.code == 2 and "Traceback" not in ran.err
    assert "Another process of torchrun ended early" in ran.err.splitlines()[-1]
    assert sorted(re.findall(r"\dof2", " ".join(path.name for path in states(workplace)))) == ["0of2", "1of2"]  # is kept
