"""Versions of what a result depends on; loads no library by itself."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
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


def _source_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and the libraries, the commit of this project, and a digest of its code, which may have changed since
    the commit; all as they are at the first call, so call it as the program starts."""
    import numpy
    import pandas
    import torch
    import torchvision

    libraries = {module.__name__: module.__version__ for module in (torch, torchvision, numpy, pandas)}
    return {"fmp": __version__, "git": git_hash(), "source": _source_digest(), "python": platform.python_version(), **libraries}
