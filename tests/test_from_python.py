"""FMP called from Python, as in a notebook that has settings of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fmp
import pytest
import torch
from command import MAPS
from conftest import RECORD
from fmp_core.errors import UserError
from fmp_core.selection.choice import Selection
from fmp_core.settings import load_settings

QUICK = {"device": "cpu", "report": False, "quiet": True, "epochs": 1, "batch_size": 8, "p": 8, "frg_samples": 2, "fresh": True}


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def rounded_products() -> Iterator[None]:
    """As some trainers advise; on a CPU that has bfloat16 products of float32 are then computed in it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def new_switches(value: str) -> Iterator[None]:
    backends: Any = torch.backends
    places = [backends.cudnn.conv, backends.mkldnn.conv, backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    for place in places[: 1 if value == "ieee" else 3]:
        place.fp32_precision = value
    try:
        yield
        assert places[0].fp32_precision == value
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


def results(name: str) -> tuple[bytes, list[bytes]]:
    """The scores of a run, and the weights it ends with."""
    fmp.FMP({**QUICK, "defense_name": name}).defense(RECORD)
    folder = Path("record") / RECORD / "defense" / name
    state = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    return (folder / "feature_maps.csv").read_bytes(), [value.numpy().tobytes() for value in state.values()]


def test_what_a_notebook_has_set_changes_no_result(workplace: Path) -> None:
    expected = results("plain")
    around: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "float64": float64,
        "medium": rounded_products,
    }
    if hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9
        around |= {"ieee": lambda: new_switches("ieee"), "tf32": lambda: new_switches("tf32")}
    for name, setting in around.items():
        with setting():
            assert results(name) == expected, name


def test_settings_of_torch_and_of_logging_are_left_as_they_were(
    workplace: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    logger = logging.getLogger("fmp_core")
    for args in (QUICK, {**QUICK, "frg_samples": 10**6}):
        result = fmp.FMP(args).defense(RECORD)
        assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
        assert not logger.handlers and logger.propagate and logger.level == logging.NOTSET
        assert all(parameter.grad is None for parameter in result["model"].parameters())
    monkeypatch.setattr(logger, "level", logging.ERROR)  # as a caller may have set it
    fmp.FMP({**QUICK, "epochs": 0}).defense(RECORD)
    assert logger.level == logging.ERROR
    monkeypatch.undo()
    logger.warning("to the caller")
    assert "to the caller" in caplog.messages


def test_a_second_mitigation_begins_with_the_attacked_model(workplace: Path) -> None:
    method = fmp.FMP({**QUICK, "epochs": 0})
    method.set_result(RECORD)
    first, second = (method.mitigation() for _ in range(2))
    assert first["model"] is not second["model"]
    for one, two in zip(first["model"].state_dict().values(), second["model"].state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("selected", "says"),
    [
        (None, "returned a NoneType, but must return a Selection"),
        (torch.ones(MAPS, dtype=torch.bool), "returned a Tensor"),
        (
            Selection(torch.ones(MAPS + 1, dtype=torch.bool)),
            rf"a torch.bool \[{MAPS + 1}\], but must be a torch.bool \[{MAPS}\]",
        ),
        (Selection(torch.ones(MAPS, dtype=torch.uint8)), r"is a torch.uint8 \["),
        (Selection([True] * MAPS), "is a list"),  # type: ignore[arg-type]
    ],
)
def test_a_selection_of_somebodys_own_must_fit(selected: Any, says: str, workplace: Path) -> None:
    fmp.FMP({**QUICK, "epochs": 0}).defense(RECORD)
    metrics = workplace / "record" / RECORD / "defense" / "fmp" / "metrics.json"
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=says):
        fmp.FMP(QUICK, select=lambda *_: selected).defense(RECORD)
    assert metrics.read_bytes() == before


def first_map(*_: Any) -> Selection:
    return Selection(torch.arange(MAPS) == 0)


def test_a_selection_of_somebodys_own_is_not_called_fmps(workplace: Path) -> None:
    metrics = fmp.FMP({**QUICK, "report": True}, select=first_map).defense(RECORD)["metrics"]
    assert metrics["chosen_by"] == f"FMP(select={__name__}.first_map)" and metrics["pruned"] == 1
    page = (workplace / "record" / RECORD / "defense" / "fmp" / "report.html").read_text()
    assert (
        f"This is an ablation (FMP(select={__name__}.first_map))" in page and f"select={__name__}.first_map).defense(" in page
    )


def test_threads_of_one_process_take_no_turns(workplace: Path) -> None:
    with fmp.RUNNING:
        said: list[str] = []

        def another() -> None:
            with pytest.raises(UserError, match="start another process") as caught:
                fmp.FMP(QUICK).defense(RECORD)
            said.append(str(caught.value))

        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
    assert said
    assert fmp.FMP({**QUICK, "epochs": 0}).defense(RECORD)["metrics"]


def test_any_mapping_will_do() -> None:
    assert fmp.FMP(MappingProxyType({"p": 3, "device": "cpu"})).settings == load_settings({"p": 3, "device": "cpu"})
