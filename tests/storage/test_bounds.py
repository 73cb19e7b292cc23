"""Files beside a record that would take all time or memory, or lead elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fmp_core.data.pixel_range import pixels_of
from fmp_core.errors import UserError
from fmp_core.results.bb_tables import read_table
from fmp_core.settings import load_settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.storage.files import HOST, file_digest, hidden, write_text
from fmp_core.system import logs

SCALES = [((0.0,), (1.0,))]


@pytest.mark.parametrize(
    "value", [{"a": 1}, [[1]], [0] * 2000, torch.zeros(2), np.zeros(2)], ids=["dict", "nested", "many", "tensor", "array"]
)
def test_a_checkpoint_whose_settings_are_no_plain_values_is_refused(value: object, tmp_path: Path) -> None:
    Checkpoint(tmp_path / "a.pt", {"lr": value}).save({})
    with pytest.raises(UserError, match="is not a checkpoint of FMP"):
        Checkpoint(tmp_path / "a.pt", {"lr": 0.1}).load()


def test_a_long_setting_of_a_checkpoint_is_shortened(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "a.pt", {"lr": "x" * 10**6, "mean": (0.5, 0.5)}).save({})
    with pytest.raises(UserError, match="lr xxx") as caught:
        Checkpoint(tmp_path / "a.pt", {"lr": 0.1, "mean": (0.5, 0.5)}).load()
    assert len(str(caught.value)) < 600


def test_a_sparse_file_is_not_hashed(tmp_path: Path) -> None:
    with open(tmp_path / "defense_result.pt", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="no file of at most 16 GiB"):
        file_digest(tmp_path / "defense_result.pt")


@pytest.mark.parametrize("how", [OSError, KeyboardInterrupt, None])
def test_a_file_is_hidden_while_it_is_replaced(how: type[BaseException] | None, tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    file.write_text("old")
    with contextlib.suppress(OSError, KeyboardInterrupt), hidden(file):
        assert not file.exists()  # as a kill would leave it
        if how:
            raise how
        file.write_text("new")
    assert file.read_text() == ("old" if how else "new") and [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    with contextlib.suppress(KeyboardInterrupt), hidden(file):
        (tmp_path / "other.csv").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]  # with the old one it would be a mixture of two


def test_a_link_to_nothing_beside_a_hidden_file_does_no_harm(tmp_path: Path) -> None:
    """The model that it led to may have gone with a scratch disk."""
    (tmp_path / "metrics.json").write_text("old")
    (tmp_path / "best.pt").symlink_to(tmp_path / "gone")
    with contextlib.suppress(KeyboardInterrupt), hidden(tmp_path / "metrics.json"):
        raise KeyboardInterrupt
    assert (tmp_path / "metrics.json").read_text() == "old"


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "predictions.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "predictions.csv", [])


def test_a_log_is_never_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    outside = tmp_path / "outside"
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "now.log").symlink_to(outside)
    path = logs.set_up(tmp_path / "log", load_settings({"quiet": "True"}))
    logging.getLogger("fmp_core").info("a line")
    logs.close()
    assert not outside.exists() and "a line" in path.read_text() and not path.is_symlink()


def test_a_leftover_of_an_impossible_process_is_no_error(tmp_path: Path) -> None:
    (tmp_path / f".a.{HOST}-{10**20}.ab.csv").touch()
    write_text(tmp_path / "a.csv", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_images_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no numbers"):
        pixels_of(torch.zeros(10**9, 0), (8, 8, 3), SCALES)


def test_one_large_image_cannot_stand_for_many() -> None:
    large = torch.zeros(3, 1200, 1200, dtype=torch.uint8)
    assert len(pixels_of([large] * 2, (8, 8, 3), SCALES)) == 2
    with pytest.raises(ValueError, match="200 images that are far larger than 8x8"):
        pixels_of([large] * 200, (8, 8, 3), SCALES)


def test_a_small_image_cannot_stand_for_large_ones_or_for_very_many() -> None:
    with pytest.raises(ValueError, match="far smaller than 400x400"):
        pixels_of([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2, (400, 400, 3), SCALES)
    with pytest.raises(ValueError, match="the same image again and again"):
        pixels_of([torch.zeros(3, 512, 512, dtype=torch.uint8)] * 100, (512, 512, 3), SCALES)
