"""Every program asks a GPU for the same kernels each time, or its numbers would differ from run to run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import SHORT
from conftest import call_fmp
from fmp_core.system.devices import as_in_a_fresh_process, exact_convolutions
from made_records import make, write_toys
from torch.nn.modules.module import register_module_forward_pre_hook


def same_kernels() -> bool:
    return torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[bool]]:
    """Whether the same kernels were asked for when a module computed; before and after a program they are not."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found: set[bool] = set()
    hook = register_module_forward_pre_hook(lambda *_: found.add(same_kernels()))
    yield found
    hook.remove()
    assert torch.backends.cudnn.deterministic is False and torch.backends.cudnn.benchmark is True


def test_kernels_are_neither_searched_for_nor_free(seen: set[bool]) -> None:
    with as_in_a_fresh_process():
        assert torch.backends.cudnn.deterministic is True and torch.backends.cudnn.benchmark is False


def test_a_run_asks_for_them_and_a_quiet_one_prints_nothing(workplace: Path, seen: set[bool]) -> None:
    ran = call_fmp(*SHORT, "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert seen == {True}


def test_a_record_is_made_with_them(tmp_path: Path, seen: set[bool]) -> None:
    write_toys(tmp_path)
    make(tmp_path, tmp_path, "--attack", "none", "--epochs", "1", "--limit_train", "8")
    assert seen == {True}


@pytest.mark.parametrize("general", ["torch", "cudnn"])
def test_a_general_switch_rounds_no_product_to_tf32_and_is_left_as_found(general: str, monkeypatch: pytest.MonkeyPatch):
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        pytest.skip("torch has no general switch before 2.9")
    place = backends if general == "torch" else backends.cudnn
    products = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [product.fp32_precision for product in products]
    monkeypatch.setattr(place, "fp32_precision", "tf32")
    with as_in_a_fresh_process(), exact_convolutions():
        assert backends.cudnn.conv.fp32_precision == "ieee" == backends.cuda.matmul.fp32_precision
    assert place.fp32_precision == "tf32"
    monkeypatch.undo()
    assert [product.fp32_precision for product in products] == before  # none has taken the general value as its own
