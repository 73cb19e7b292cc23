"""Which feature maps to prune.

:func:`~.select.select_feature_maps` returns one :class:`~.choice.Selection`: by FRG (the paper), by an inverted trigger
(``--preset strong``), at random, or none. :mod:`.ablation` has other ways to select, for comparison.
"""
