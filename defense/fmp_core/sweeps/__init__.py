"""Sweeps: records x defenses x settings x seeds, run on this machine or on a Slurm cluster (docs/sweeps.md).

A sweep file (:func:`plan.read_sweep`) becomes jobs (:func:`plan.plan`); :func:`run.run_sweep` works off those that are not
done, with :mod:`local` or :mod:`slurm`; :mod:`jobs` says what one job is. :mod:`paper` is the sweep behind the paper's tables.
Nothing here imports torch or pandas before it is needed.
"""
