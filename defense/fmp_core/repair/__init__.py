"""Repairing the pruned model.

:class:`~.finetune.FineTuning` trains it on the clean subset (the paper), optionally with :mod:`.unlearning` of inverted
triggers and :mod:`.distillation` from the attacked model (``--preset strong``).
"""
