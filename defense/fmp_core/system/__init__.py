"""What a run needs of the machine and the terminal.

Public: :mod:`~fmp_core.system.cli` (``Parser``, ``run_main``, ``Stages``, ``kept``), :mod:`~fmp_core.system.logs` (``set_up``),
:mod:`~fmp_core.system.progress` (``Progress``), :mod:`~fmp_core.system.devices` (``choose_device``),
:mod:`~fmp_core.system.distributed` (``join``, ``is_leader``) and
:mod:`~fmp_core.system.versions` (``versions``). The first three load no torch.
"""
