"""Attack records, datasets and images: from the disk to uint8 tensors, and records back to the disk.

:func:`~.attack_record.read_attack_record` gives an :class:`~.attack_record.AttackRecord`, :func:`~.datasets.open_split` a
:class:`~.images.Split` of a clean dataset, :func:`~.clean_subset.choose_subset` the images that the defender owns;
:func:`~.write_record.write_attack_record` writes what BackdoorBench reads.
"""
