"""BackdoorBench's models: built, traced, pruned, trained and evaluated.

:func:`~.build.load_model` builds one from a record's weights, :func:`~.feature_maps.trace_conv_layers` lists its feature maps,
:func:`~.pruning.prune_feature_maps` zeroes some, :class:`~.training.Trainer` trains, and :func:`~.evaluate.evaluate` counts
Acc, ASR and RA. :mod:`.fast_ops` has the cheaper forms of operations that ranking uses.
"""
