"""Plain lines on the terminal; all of them, with BackdoorBench's prefix, in the file."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fmp_core.errors import UserError
from fmp_core.settings import load_settings
from fmp_core.system import logs
from fmp_core.system.progress import Progress

LINE = re.compile(r"\d{4}-\d\d-\d\d:\d\d:\d\d:\d\d \[INFO    ] \[test_logs.py:\d+] (.*)")


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    yield logs.LOGGER
    logs.close()


def speak() -> None:
    logs.LOGGER.debug("small")
    logs.LOGGER.info("usual")
    logs.to_file("long")
    logs.LOGGER.warning("odd")


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ({}, ["usual", "odd"]),
        ({"quiet": True}, ["odd"]),
        ({"log_level": "warning"}, ["odd"]),
        ({"log_level": "debug"}, ["small", "usual", "long", "odd"]),
    ],
)
def test_the_terminal_shows_what_is_asked_for_and_the_file_holds_all(
    flags: dict, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = logs.set_up(tmp_path / "log", load_settings(flags))
    speak()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-len(shown) :] == shown
    assert len(lines) == len(shown) or flags == {"log_level": "debug"}  # then the settings come first
    text = path.read_text()
    assert [match[1] for line in text.splitlines() if (match := LINE.fullmatch(line))] == ["usual", "long"]
    assert "'eps': 0.00392" in text and "'terminal_info'" in text and "small" in text


def test_a_second_run_closes_the_first_log(tmp_path: Path):
    first = logs.set_up(tmp_path / "a", load_settings({}))
    second = logs.set_up(tmp_path / "b", load_settings({}), {"only": "this"})
    logs.LOGGER.info("to the second")
    assert "to the second" not in first.read_text() and "to the second" in second.read_text()
    assert "'only': 'this'" in second.read_text() and "'eps'" not in second.read_text()


def test_a_log_that_cannot_be_made_is_a_sentence(tmp_path: Path):
    (tmp_path / "log").write_text("a file")
    with pytest.raises(UserError, match=r"log.*cannot be written"):
        logs.set_up(tmp_path / "log", load_settings({}))


def test_a_bar_hides_where_messages_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for quiet in (False, True):
        logs.set_up(tmp_path, load_settings({"quiet": quiet}))
        with Progress("Testing", 3, "images", logs.LOGGER) as bar:
            bar.add(4)
            assert bar.bar.disable is quiet and bar.total == 4


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("fmp_core.system.progress.LINE_EVERY", -1.0)
    logs.LOGGER.propagate = True
    with caplog.at_level(logging.INFO, "fmp_core"), Progress("Testing", 4, "images", logs.LOGGER) as bar:
        bar.add(2)
    assert caplog.messages == ["Testing: 2 of 4 images, about 0 s left"]
