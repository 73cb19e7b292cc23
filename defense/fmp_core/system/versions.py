"""Versions of what a result depends on; loads no library by itself."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from fmp_core import __version__

COMMIT_FILE = Path(__file__).resolve().parents[1] / "commit.txt"  # written by backdoorbench/install.py; absent in the project


def git_hash() -> str:
    """The commit a copy was made of; else that of the checkout, with ``-dirty`` if it has changes; else ``unknown``."""
    if COMMIT_FILE.is_file():
        return COMMIT_FILE.read_text(encoding="utf-8").strip()
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a copy lies in the repository of something else
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and the libraries, and the commit of this project."""
    import numpy
    import pandas
    import torch
    import torchvision

    libraries = {module.__name__: module.__version__ for module in (torch, torchvision, numpy, pandas)}
    return {"fmp": __version__, "git": git_hash(), "python": platform.python_version(), **libraries}
