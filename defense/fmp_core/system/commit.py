"""Which commit of this project is running: in its own checkout, or copied into somebody else's."""

from __future__ import annotations

import subprocess
from pathlib import Path

COMMIT_FILE = Path(__file__).resolve().parents[1] / "commit.txt"  # written by backdoorbench/install.py; absent in the project


def git_hash() -> str:
    """The commit a copy was made of; else that of the checkout, with ``-dirty`` if it has changes; else ``unknown``."""
    if COMMIT_FILE.is_file():
        return COMMIT_FILE.read_text(encoding="utf-8").strip()
    here = Path(__file__).resolve()
    try:
        _git(here, "ls-files", "--error-unmatch", here.name)  # a copy lies in the repository of something else
        return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(file: Path, *words: str) -> str:
    command = ["git", "-C", str(file.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
