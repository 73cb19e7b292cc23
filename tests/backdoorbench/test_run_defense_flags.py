"""What users give to run_defense.py: records by path, files, and flags that do not go together; what a kill leaves."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import run_defense
import torch
from command import Edit
from conftest import RECORD
from fmp_core.backdoorbench.run import _old_result_kept, run_on_record
from fmp_core.backdoorbench.workspace import open_job
from fmp_core.errors import UserError
from fmp_core.results.collect import collect
from fmp_core.results.read import SWEEP_MARK, read_result
from fmp_core.storage.files import aside_by_sweep, bring_back, file_digest
from fmp_core.storage.lock import locked, result_lock
from result_files import one_row, three_rows, write


def run(
    checkout: Path,
    *extra: str,
    record: str = RECORD,
    defense: str = "echo",
    analysis: str | None = None,
    few: int | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
) -> int:
    job = open_job(checkout, "record", record, "data", "cpu")
    job = dataclasses.replace(job, device=device)
    return run_on_record(job, defense, analysis, sys.executable, list(extra), few, dtype)[1]


@pytest.mark.parametrize("where", ["{root}/record/badnet_tiny", "../record/badnet_tiny", "../{name}/record/badnet_tiny/"])
def test_a_path_may_name_what_is_defended(
    where: str, checkout: Path, tiny_record: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "temporary" / "deeper").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary" / "deeper"))
    named = where.format(root=Path.cwd(), name=f"../{Path.cwd().name}")
    for _ in range(2):
        assert run(checkout, record=named) == 0
    assert (tiny_record / "defense" / "echo" / "defense_result.pt").is_file()
    assert [path.name for path in (tmp_path / "temporary").rglob("*")] == ["deeper"]


def test_files_are_named_from_here_however_they_are_given(checkout: Path, tiny_record: Path) -> None:
    Path("mine.txt").write_text("0\n")
    for extra in (("--index=mine.txt",), ("--index", "mine.txt")):
        assert run(checkout, *extra) == 0
    assert run(checkout, "--index=gone.txt") == 1


@pytest.mark.parametrize("flags", [["--checkpoint_save", "mine/"], ["--checkpoint_save=mine/"]])
def test_folders_are_named_from_here_too(flags: list[str], checkout: Path, tiny_record: Path) -> None:
    Path("mine").mkdir()
    assert run(checkout, *flags) == 0
    assert Path("mine/model.pt").is_file()


@pytest.mark.parametrize("flag", ["--pruning_number=0.1", "--pruning_num", "--yaml_path=mine.yaml", "mine.yaml"])
def test_anp_at_a_number_takes_no_test_images_however_it_is_given(flag: str, checkout: Path, tiny_record: Path) -> None:
    Path("mine.yaml").write_text("pruning_number: 0.1\n")
    with pytest.raises(UserError, match="--test_images cannot be used with anp"):
        run(checkout, flag, defense="anp", few=4)


def test_labels_may_be_tensors_without_dimensions(checkout: Path, tiny_record: Path, edit_record: Edit) -> None:
    """As those of BackdoorBench's CelebA are."""

    def change(content: dict[str, Any]) -> None:
        for item in content["bd_test"]["bd_data_container"]["data_dict"].values():
            item["other_info"] = [torch.tensor(value) for value in item["other_info"]]

    edit_record(tiny_record, change)
    assert run(checkout) == 0


def test_an_analysis_takes_no_test_images(checkout: Path, tiny_record: Path) -> None:
    with pytest.raises(UserError, match="--test_images is for defenses"):
        run(checkout, analysis="names", few=4)


def test_bf16_is_noted_and_decides(checkout: Path, tiny_record: Path) -> None:
    """So that runs in two precisions are not taken for two runs of one."""
    results, digests = tiny_record / "defense" / "counter", set()
    for dtype in ("fp32", "bf16", "bf16"):
        assert run(checkout, "--keep", "yes", defense="counter", dtype=dtype) == 0
        assert ("; bf16 autocast" in (results / "run_defense.log").read_text()) == (dtype == "bf16")
        digests.add((dtype, read_result(results).settings_digest))
    assert len(digests) == len({digest for _, digest in digests}) == 2


@pytest.mark.parametrize("instead", [{"analysis": "names"}, {"device": "cuda:0"}])
def test_bf16_is_for_defenses_on_a_cpu(instead: dict[str, str], checkout: Path, tiny_record: Path) -> None:
    with pytest.raises(UserError, match="--dtype bf16 is for defenses on a CPU"):
        run(checkout, dtype="bf16", **instead)  # type: ignore[arg-type]


def test_what_a_killed_run_put_aside_does_not_replace_a_newer_result(tmp_path: Path) -> None:
    folder, aside = tmp_path / "ft", tmp_path / ".ft.before"
    for place in (folder, aside):
        write(place / "who", place.name)
        write(place / "defense_result.pt", "")
    bring_back(folder, aside, "defense_result.pt")
    assert (folder / "who").read_text() == "ft" and not aside.exists()
    write(aside / "who", "before")
    (folder / "defense_result.pt").unlink()
    bring_back(folder, aside, "defense_result.pt")
    assert (folder / "who").read_text() == "before" and not aside.exists()


def test_an_earlier_result_that_a_killed_run_put_aside_is_named(tmp_path: Path) -> None:
    for name in (".ft.before", ".fp.aside"):
        write(tmp_path / "r" / "defense" / name / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
    said: list[str] = []
    assert collect(tmp_path, said.append).empty
    assert "defense/.fp.aside is an earlier result; a sweep that" in said[0]
    assert "defense/.ft.before is an earlier result; a run_defense.py that" in said[1]


@pytest.mark.parametrize("aside", [".ft.before", ".ft.aside"])  # put aside by an earlier run, by a sweep
def test_a_whole_result_outlives_a_killed_run_and_a_failed_one(aside: str, tmp_path: Path) -> None:
    """The killed run had ended its training, but not its last test, after which the note is written."""
    ft = tmp_path / "ft"
    write(tmp_path / aside / "defense_result.pt", "whole")
    write(ft / "defense_result.pt", "not tested")
    with pytest.raises(KeyboardInterrupt), _old_result_kept(ft, ft / "run_defense.log"):
        write(ft / "run_defense.log", "Traceback")
        raise KeyboardInterrupt
    assert (ft / "defense_result.pt").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "ft.failed.log"]


def test_the_first_stages_of_rnp_are_no_result(tmp_path: Path) -> None:
    """It writes a summary of each into one file."""
    write(tmp_path / "rnp" / "rnp_df_summary.csv", three_rows(0.4, 0.2, 0.2))
    with pytest.raises(UserError, match="of a stage before rnp's last"):
        read_result(tmp_path / "rnp")
    write(tmp_path / "rnp" / "rnp_df_summary.csv", one_row(0.9, 0.1, 0.8))
    assert read_result(tmp_path / "rnp").metrics["test_acc"] == 0.9


def test_a_result_that_is_replaced_stays_however_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link is only a link; and Ctrl-C while the old result is removed comes too late."""
    write(tmp_path / "run1" / "defense_result.pt", "old")
    ft = tmp_path / "ft"
    ft.symlink_to("run1")
    with _old_result_kept(ft, ft / "run_defense.log") as outcome:
        write(ft / "defense_result.pt", "new")
        outcome.ended = True
    assert (ft / "defense_result.pt").read_text() == "new" and (tmp_path / "run1" / "defense_result.pt").read_text() == "old"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", interrupted)
        with _old_result_kept(ft, ft / "run_defense.log") as outcome:
            write(ft / "defense_result.pt", "newest")
            write(ft / "run_defense.json", "{}")
            outcome.ended = True
    assert (ft / "defense_result.pt").read_text() == "newest"
    with _old_result_kept(ft, ft / "run_defense.log"):
        pass
    assert (ft / "defense_result.pt").read_text() == "newest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft", "run1"]


def test_each_flag_reaches_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(run_defense, "job_of", lambda args: "job")
    monkeypatch.setattr(run_defense, "run_on_record", lambda *about: (given.append(about), ("ended", 0))[1])
    flags = ["--result_file", "r", "--python", "py", "--defense", "ft"]
    assert run_defense.main([*flags, "--test_images", "50", "--dtype", "bf16", "--", "--epochs", "1"]) == 0
    assert run_defense.main([*flags, "--analysis", "tsne"]) == 0
    assert given == [("job", "ft", None, "py", ["--epochs", "1"], 50, "bf16"), ("job", "ft", "tsne", "py", [], None, "fp32")]


def test_within_a_sweep_the_sweep_holds_the_lock_and_keeps_the_old_result(
    checkout: Path, tiny_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tiny_record / "defense" / "echo"
    write(aside_by_sweep(results) / "who", "another seed")
    monkeypatch.setenv(SWEEP_MARK, "sweeps/s")
    with locked(results.parent, wait=False, name=result_lock(results)):
        assert run(checkout) == 0
    assert (aside_by_sweep(results) / "who").read_text() == "another seed"
    assert (results / "defense_result.pt").is_file()


def test_the_note_says_what_was_defended_and_how(checkout: Path, tiny_record: Path) -> None:
    assert run(checkout, "--keep", "yes", defense="counter", few=4) == 0
    results = tiny_record / "defense" / "counter"
    assert json.loads((results / "run_defense.json").read_text()) == {
        "defense_result": file_digest(results / "defense_result.pt"),
        "attack_result": file_digest(tiny_record / "attack_result.pt"),
        "dtype": "fp32",
        "test_images": 4,
    }
