"""Files: written whole or not at all (:mod:`.files`), read as data and never run (:func:`~.torch_file.load_torch_file`).

:class:`~.checkpoint.Checkpoint` keeps the state of an unfinished training, :func:`~.checkpoint.content_key` names results by
what they depend on.
"""
