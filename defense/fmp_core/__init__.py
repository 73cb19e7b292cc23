"""Adversarial Feature Map Pruning (FMP, ICLR 2024): the library behind ``defense/fmp.py``.

Data flows one way: records -> datasets, models -> ranking (frg) -> pruning -> finetune -> evaluate -> report.
"""

__version__ = "0.1.0"
