"""How fast ranking, fine-tuning and testing are here, beside what they can cost at least (``record_scripts/bench_frg.py``)."""
