"""Versions of what a result depends on; loads no library by itself."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import fmp_core
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


def source_digest(*modules: ModuleType) -> str:
    """SHA-256 over the source code of ``modules`` (of a package: all its modules), for keys of results that code decides.

    To be called as a program starts: later the files may not be the code that runs.
    """
    digest = hashlib.sha256()
    for module in modules:
        file = Path(str(module.__file__))
        for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


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
    return {
        "fmp": __version__,
        "git": git_hash(),
        "source": source_digest(fmp_core)[:16],
        "python": platform.python_version(),
        **libraries,
    }
