"""Trigger inversion, as in Neural Cleanse (not in the FMP paper).

:class:`~.search.TriggerSearch` inverts :class:`~.trigger.InvertedTrigger` objects from clean images; its
:class:`~.verdict.Verdict` says whether the model is backdoored, and towards which class.
"""
