"""Files: written whole or not at all (:mod:`.files`), read as data and never run (:func:`~.torch_file.load_torch_file`), held
by one process at a time (:mod:`.lock`), and named by what they depend on (:mod:`.checkpoint`).
"""
