"""Repairing the pruned model.

:class:`~.finetune.FineTuning` trains it on the clean subset (the paper), optionally with :mod:`.unlearning` of inverted
triggers, :mod:`.distillation` from the attacked model and, at the end, :mod:`.interpolation` with it (``--preset strong``).
"""
