"""Jobs of a sweep are other processes, so the workplace's record holds a model that they know."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def workplace_template(real_workplace_template: Path) -> Path:
    return real_workplace_template


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a record ``r`` (its model is never opened here)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "record" / "r").mkdir(parents=True)
    (tmp_path / "record" / "r" / "attack_result.pt").write_bytes(b"model")
    return tmp_path
