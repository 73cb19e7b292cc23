"""Adversarial Feature Map Pruning (FMP, ICLR 2024): the library behind ``defense/fmp.py``.

docs/architecture.md describes the packages; ``make lint`` checks the direction of their imports.
"""

from pathlib import Path

__version__ = "0.1.0"
PROJECT = Path(__file__).resolve().parents[2]  # holds config/ and record_scripts/, in a BackdoorBench checkout too
