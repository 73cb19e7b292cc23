"""Which of BackdoorBench's files hold a result, and which log belongs to it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fmp_core.errors import UserError
from fmp_core.results.bb_files import logs_until
from fmp_core.results.read import read_result
from result_files import three_rows, write


def test_a_middle_stage_of_abl_is_no_result(tmp_path: Path) -> None:
    """abl fine-tunes between its first and its last stage, and calls that finetune; fp's result has the same name."""
    write(tmp_path / "finetune_df_summary.csv", three_rows(0.91, 0.99, 0.01))
    assert read_result(tmp_path).metrics["test_acc"] == 0.91  # fp
    write(tmp_path / "pre_train_df_summary.csv", three_rows(0.9, 0.99, 0.01))
    with pytest.raises(UserError, match="may not have ended"):
        read_result(tmp_path)
    write(tmp_path / "abl_df_summary.csv", three_rows(0.85, 0.02, 0.8))
    assert read_result(tmp_path).metrics["test_acc"] == 0.85


def test_the_log_of_a_later_run_that_did_not_end_says_nothing(tmp_path: Path) -> None:
    first, second = (tmp_path / "log" / f"2026_11_0{day}_10_00_00.log" for day in (1, 2))
    write(first, "{'ratio': 0.1, 'random_seed': 0, ")
    write(second, "{'ratio': 0.5, 'random_seed': 3, ")
    write(tmp_path / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
    assert read_result(tmp_path).seed == 3  # all written now, as files that were copied: the newest counts
    for path, hours in ((first, 10), (tmp_path / "ft_df_summary.csv", 10), (second, 1)):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    assert (read_result(tmp_path).seed, read_result(tmp_path).ratio) == (0, 0.1)
    assert logs_until(tmp_path, time.time()) == [second, first]


@pytest.mark.parametrize("values", ["[10, 20]", "[10,\n 20]"])
def test_all_of_a_list_is_a_setting(tmp_path: Path, values: str) -> None:
    """Of rnp's milestones, for example, the first alone would make two schedules one."""
    digests = []
    for schedule in ("[10, 20]", values, "[10, 15]"):
        write(tmp_path / "clp_df_summary.csv", three_rows(0.9, 0.1, 0.8))
        write(tmp_path / "log" / "2026.log", f"{{'schedule': {schedule},\n 'u': 3,\n 'random_seed': 0}}\n")
        digests.append(read_result(tmp_path).settings_digest)
    assert digests[0] == digests[1] != digests[2]


def test_settings_of_the_record_are_no_settings_of_the_defense(tmp_path: Path) -> None:
    """... so that one method on two attacks is one method."""
    digests = []
    for attack, rate in (("badnet", 0.1), ("blended", 0.1), ("blended", 0.2)):
        write(tmp_path / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
        write(tmp_path / "log" / "2026.log", f"{{'attack': '{attack}',\n 'lr': {rate},\n 'random_seed': 0}}\n")
        digests.append(read_result(tmp_path).settings_digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_share_of_clean_data_that_the_script_never_reads_is_none(tmp_path: Path) -> None:
    write(tmp_path / "d-br_df_summary.csv", three_rows(0.9, 0.1, 0.8))
    write(tmp_path / "log" / "2026_11_01.log", "{'ratio': 0.05, 'random_seed': 3, ")
    assert (read_result(tmp_path).seed, read_result(tmp_path).ratio) == (3, None)
