"""Each comparison can fail; with BACKDOORBENCH_ROOT set, BackdoorBench itself must agree."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import check_parity as script
import pandas as pd
import pytest
import torch
from conftest import RECORD, Ran
from fmp_core.backdoorbench import parity
from fmp_core.backdoorbench.workspace import open_job
from fmp_core.results.bb_tables import TEST_COLUMNS, summary_frame, write_csv

COLUMNS = ["epoch", "batch", "train_epoch_loss_avg_over_batch", "train_acc", *TEST_COLUMNS]
FIGURES = {"test_acc": 0.9, "test_asr": 0.1, "test_ra": 0.8, "clean_test_loss_avg_over_batch": 2.0}
FIGURES["bd_test_loss_avg_over_batch"] = 3.0
ROW = [1, 0.5, 0.25, 2.0, 3.0, 0.9, 0.1, 0.8]


def table(path: Path, rows: int = 2, **changes: object) -> Path:
    frame = pd.DataFrame([[number, *ROW] for number in range(rows)], columns=COLUMNS, dtype=object)
    write_csv(path, frame.assign(**changes).astype(object))
    return path


def verdicts(checks: list[parity.Check]) -> list[bool | None]:
    return [check.passed for check in checks]


def test_fractions_must_be_equal_and_losses_close() -> None:
    assert all(verdicts(parity.compare_figures("model", FIGURES, FIGURES)))
    ours = {**FIGURES, "test_acc": 0.9 + 1e-12, "bd_test_loss_avg_over_batch": 3.001}
    assert verdicts(parity.compare_figures("model", FIGURES, ours)) == [False, True, True, True, False]


def test_data_must_be_equal_to_the_last_label_and_pixel() -> None:
    ours = {"clean subset of the seed": [5, 2], "clean subset: labels": [0, 1], "poisoned test set: pixels": "cd"}
    assert all(verdicts(parity.compare_data(ours, ours)))
    other = {"clean subset of the seed": [2, 5], "poisoned test set: pixels": "ce"}
    assert verdicts(parity.compare_data({**ours, **other}, ours)) == [False, True, False]


def test_tables_are_compared_by_columns_labels_and_formats(tmp_path: Path) -> None:
    theirs = table(tmp_path / "ft_df.csv", rows=1)
    compare = parity.compare_tables
    assert verdicts(compare(theirs, table(tmp_path / "fmp_df.csv", rows=3))) == [True, True, True]
    assert verdicts(compare(theirs, table(tmp_path / "fmp_df.csv", test_acc=["nan_value", 0.5]))) == [True, True, True]
    assert verdicts(compare(theirs, table(tmp_path / "fmp_df.csv", test_acc="90 %"))) == [True, True, False]
    assert verdicts(compare(theirs, table(tmp_path / "fmp_df.csv", epoch=0.5))) == [True, True, False]
    assert verdicts(compare(theirs, table(tmp_path / "fmp_df.csv", test_der=0.5))) == [False, True]
    assert verdicts(compare(tmp_path / "none.csv", theirs)) == [False]


def test_summaries_are_compared_by_row_labels(tmp_path: Path) -> None:
    frame = pd.read_csv(table(tmp_path / "df.csv"), index_col=0, dtype=object)
    write_csv(tmp_path / "ft_df_summary.csv", summary_frame(frame))
    write_csv(tmp_path / "fmp_df_summary.csv", summary_frame(frame).rename({"last": "final"}))
    ours = tmp_path / "fmp_df_summary.csv"
    assert verdicts(parity.compare_tables(tmp_path / "ft_df_summary.csv", ours))[1] is False
    write_csv(ours, summary_frame(frame))
    assert verdicts(parity.compare_tables(tmp_path / "ft_df_summary.csv", ours)) == [True, True, True]


def test_results_are_compared_by_keys_order_shapes_and_dtypes(tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    content = {"model_name": "resnet18", "num_classes": 10, "model": weights}
    torch.save(content, tmp_path / "theirs.pt")
    for model, expected in (
        (weights, True),
        (dict(reversed(weights.items())), False),
        ({**weights, "b": torch.zeros(4)}, False),
        ({**weights, "b": torch.zeros(3, dtype=torch.float16)}, False),
    ):
        torch.save({**content, "model": model}, tmp_path / "ours.pt")
        assert parity.compare_results(tmp_path / "theirs.pt", tmp_path / "ours.pt").passed is expected


def test_a_run_that_backdoorbench_cannot_repeat_is_refused(
    run_fmp: Callable[..., Ran], tiny_record: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backdoorbench", str(checkout), "--result_file", RECORD, "--device", "cpu"]
    ran = run_fmp("--result_file", RECORD, "--selection", "none", "--epochs", "0", "--test_images", "5")
    assert ran.code == 0 and script.main(flags) == 2
    assert "of a run with --test_images, whose figures BackdoorBench cannot repeat" in capsys.readouterr().err
    (tiny_record / "defense" / "fmp" / "metrics.json").write_text("{")
    assert script.main(flags) == 2
    assert "metrics.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "linked"])
def test_a_record_may_be_named_by_its_own_folder_or_a_link(
    name: str, tiny_record: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path("data").resolve()
    (tmp_path / "linked").symlink_to(tiny_record.resolve())
    monkeypatch.chdir(tiny_record if name == "." else tmp_path)
    given = "." if name == "." else str(tmp_path / "linked")
    facts = parity.measure_with_fmp(open_job(checkout.resolve(), ".", given, data, "cpu"), tmp_path)
    assert set(facts["attacked"]) >= {"test_acc", "test_asr", "test_ra"}


@pytest.mark.parametrize(("results", "code"), [([True, None], 0), ([True, False, None], 1)])
def test_the_exit_code_says_whether_all_agree(
    results: list[bool | None], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparisons are stood in for, since BackdoorBench cannot be shipped."""
    monkeypatch.setattr(script, "job_of", lambda args: args)
    monkeypatch.setattr(parity, "check_parity", lambda *_: [parity.Check("it", result, "") for result in results])
    assert script.main(["--result_file", "r"]) == code
    said = f"{results.count(True)} passed, {results.count(False)} failed, {results.count(None)} skipped"
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.skipif("BACKDOORBENCH_ROOT" not in os.environ, reason="BACKDOORBENCH_ROOT names no BackdoorBench checkout")
def test_backdoorbench_agrees(
    run_fmp: Callable[..., Ran], tiny_record: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = {"label_names": [f"class {number}" for number in range(10)]}  # torchvision wants it, FMP does not
    (workplace / "data" / "cifar10" / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    flags = ["--backdoorbench", os.environ["BACKDOORBENCH_ROOT"], "--result_file", RECORD, "--device", "cpu"]
    assert script.main(flags) == 2
    assert "run python defense/fmp.py" in capsys.readouterr().err
    assert run_fmp("--result_file", RECORD, "--frg_samples", "1", "--epochs", "2", "--ratio", "0.4").code == 0
    code = script.main(flags)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "FAIL" not in printed and "0 failed" in printed
