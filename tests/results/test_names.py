"""Folders whose names, as tables print them, are already taken."""

from __future__ import annotations

from pathlib import Path

import collect as script
import pytest
from fmp_core.results.collect import BASELINE, collect
from result_files import metrics_json, three_rows, write

VERDICT = {"backdoored": True, "target": 2, "lead": 0.8, "too_few": False}


def record(folder: Path, accuracy: float) -> None:
    """A record with the result of ``strong``, which names a target."""
    write(folder / "attack_df_summary.csv", three_rows(0.9, 0.97, 0.1))
    before = {"test_acc": 0.9, "test_asr": 0.97, "test_ra": 0.1}
    write(folder / "defense" / "strong" / "metrics.json", metrics_json(accuracy, 0.1, 0.8, before=before, verdict=VERDICT))


def test_records_that_look_the_same_in_print_stay_two(tmp_path: Path) -> None:
    for name, accuracy in (("x\rbadnet", 0.81), ("x\x1bbadnet", 0.82)):
        record(tmp_path / name, accuracy)
    found = collect(tmp_path, pytest.fail)
    ours = found[found["defense"] == "strong"]
    assert dict(zip(ours["record"], ours["test_acc"], strict=True)) == {"x?badnet": 0.81, "x?badnet (2)": 0.82}
    assert script.main([str(tmp_path)]) == 0


def test_a_defense_with_the_name_of_the_attacked_model_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "badnet", 0.8)
    (tmp_path / "badnet" / "defense" / "strong").rename(tmp_path / "badnet" / "defense" / BASELINE)
    record(tmp_path / "badnet", 0.8)
    said: list[str] = []
    found = collect(tmp_path, said.append).set_index("defense")
    assert found.index.tolist() == [BASELINE, "strong"] and found.loc[BASELINE, "test_asr"] == 0.97
    assert len(said) == 1 and "rename the folder" in said[0]
    assert script.main([str(tmp_path)]) == 0
    assert "rename the folder" in capsys.readouterr().err
