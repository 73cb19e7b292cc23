"""What a run needs of the machine and the terminal: :mod:`.cli` (one way to parse and to end), :mod:`.logs`, :mod:`.progress`,
:mod:`.devices`, :mod:`.distributed` and :mod:`.versions`. Only devices and distributed load torch.
"""
