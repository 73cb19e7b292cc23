"""FMP beside BackdoorBench (BB): put FMP into a checkout, run BB's own scripts on a record, and check that the two agree.

``install`` and ``uninstall`` (install.py), ``run_on_record`` (run.py), ``check_parity`` (parity.py). ``workspace`` lays a
record out as BB expects it and ``process`` runs a script there; ``shims.py`` and ``probe.py`` run inside BB's process and
import nothing of FMP. While BB's process runs, ours holds no torch: BB needs the memory.
"""
