"""Attack records made without BackdoorBench: poison a dataset, train a model on it, write the record's folder.

Public: ``settings.AttackSettings`` and ``RecordSettings`` (the flags), ``make_record.make_record``. One file each for the
triggers, their files, the choice of images and labels, and training.
"""
