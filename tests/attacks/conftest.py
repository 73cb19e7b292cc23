"""A folder of datasets for the command that makes records."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_records import write_toys


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data/toys``: an image folder of 24 + 9 random 32x32 images in 3 classes. Not to be changed."""
    root = tmp_path_factory.mktemp("data")
    write_toys(root)
    return root
