"""Jobs of a sweep are other processes, so the workplace's record holds a model that they know."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def workplace_template(real_workplace_template: Path) -> Path:
    return real_workplace_template
