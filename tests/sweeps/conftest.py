"""Sweeps start processes, so their records have a model of BackdoorBench's."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def workplace_template(real_workplace_template: Path) -> Path:
    return real_workplace_template
