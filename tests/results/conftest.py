"""A tree of result files, and the figures that are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawn import figures_written
from matplotlib.figure import Figure
from result_files import metrics_json, one_row, three_rows, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two records with a defense of each shape; every value says which."""
    badnet = tmp_path / "badnet_cifar10"
    write(badnet / "attack_df_summary.csv", three_rows(0.9, 0.98, 0.01))
    info = {"attack": "badnet", "dataset": "cifar10", "model": "preactresnet18", "pratio": 0.1, "random_seed": 0}
    torch.save(info, badnet / "info.pickle")
    place = badnet / "defense"
    write(place / "ft" / "ft_df_summary.csv", three_rows(0.91, 0.5, 0.4))
    write(place / "ft" / "log" / "x.log", "... {'cleaning_ratio': 0.5,\n 'ratio': 0.05,\n 'random_seed': 7, ...")
    write(place / "fp" / "finetune_df_summary.csv", three_rows(0.92, 0.6, 0.3))
    write(place / "fp" / "prune_log_summary.csv", ",num_pruned,test_acc,test_asr,test_ra\nlast,350,0.1,0.1,0.1\n")
    write(place / "clp" / "clp_df_summary.csv", one_row(0.8, 0.1, 0.7))
    write(place / "clp" / "run_defense.log", "loading\n\nexit code 0 after 68 s; CPU 48 s\n")
    write(place / "anp" / "anp_df_summary.csv", one_row(0.81, 0.2, 0.6))
    write(place / "anp" / "threshold_df.csv", one_row(0.0, 0.0, 0.0))
    write(place / "nad" / "nad_df_summary.csv", three_rows(0.89, 0.3, 0.5))
    write(place / "nad" / "nad_te_df_summary.csv", three_rows(0.1, 0.1, 0.1))
    write(place / "nc" / "nc_df_summary.csv", one_row(0.9, 0.98, 0.01))
    write(place / "ft-sam" / "log" / "d-sam_df_summary.csv", three_rows(0.88, 0.05, 0.8, head=""))
    write(place / "npd" / "npd_df_summary.csv", three_rows(88.0, 7.0, 75.0, head=""))
    write(place / "mcr" / "mcr_df_summary.csv", ",test_acc,test_asr,test_ra,t\n0,0.03,0.87,0.8,0.1\n")
    spent = {"seconds": {"load": 1.5, "ranking": 2}, "cpu_seconds": 3.25}
    write(place / "fmp" / "metrics.json", metrics_json(0.93, 0.02, 0.9, **spent))
    write(place / "fmp-s1" / "metrics.json", metrics_json(0.91, 0.04, 0.88, seed=1))
    (place / "only-cached" / "cache").mkdir(parents=True)
    blended = tmp_path / "blended_cifar10" / "defense"
    write(blended / "fmp" / "metrics.json", metrics_json(0.8, 0.1, 0.7))
    return tmp_path


@pytest.fixture
def saved_figures() -> Iterator[list[Figure]]:
    """The figures that are written while the test runs, in order."""
    with figures_written() as found:
        yield found
