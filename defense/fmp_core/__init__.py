"""Adversarial Feature Map Pruning (FMP, ICLR 2024): the library behind ``defense/fmp.py``.

Settings, system, storage, data, models, inputs, frg, inversion, selection, repair, results, attacks, then report, sweeps and
backdoorbench: each imports only what stands before it (``make lint`` checks that).
"""

__version__ = "0.1.0"
