"""The two numpy functions that pickles of numpy arrays name, under the names of numpy 1 and numpy 2."""

from __future__ import annotations

from typing import Any

import numpy as np

_core: Any = np._core if hasattr(np, "_core") else np.core
RECONSTRUCT = _core.multiarray._reconstruct
SCALAR = _core.multiarray.scalar

# (module, name) as written in the file -> the object
NUMPY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): SCALAR for core in ("core", "_core")},
}
FROM_BUFFER: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.numeric", "_frombuffer"): _core.numeric._frombuffer for core in ("core", "_core")
}
