"""Versions of what a result depends on."""

from __future__ import annotations

import platform

import numpy as np
import pandas as pd
import torch
import torchvision

from fmp_core import __version__
from fmp_core.system.commit import git_hash


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit it was made with."""
    return {
        "fmp": __version__,
        "git": git_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }
