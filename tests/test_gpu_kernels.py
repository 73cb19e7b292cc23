"""Every program asks a GPU for the same kernels each time, or its numbers would differ from run to run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import SHORT
from conftest import call_fmp
from fmp_core.system.devices import make_deterministic
from made_records import make, write_toys


@pytest.fixture(autouse=True)
def any_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch begins, but for the search for the fastest kernels, which is off."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def same_kernels() -> bool:
    return torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_kernels_are_neither_searched_for_nor_free() -> None:
    assert not same_kernels()
    make_deterministic()
    assert torch.backends.cudnn.deterministic is True and torch.backends.cudnn.benchmark is False


def test_a_run_asks_for_them_and_a_quiet_one_prints_nothing(workplace: Path) -> None:
    ran = call_fmp(*SHORT, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert same_kernels()


def test_a_record_is_made_with_them(tmp_path: Path) -> None:
    write_toys(tmp_path)
    make(tmp_path, tmp_path, "--attack", "none", "--epochs", "1", "--limit_train", "8")
    assert same_kernels()
