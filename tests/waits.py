"""Counting what makes the host wait for a device: values read from it, one by one or copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}


class CountWaits(TorchDispatchMode):
    """While active, counts in ``count``: a number read from a tensor (on any device, so that tests on a CPU see it), sizes that
    depend on values, and copies from a GPU that the host waits for."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func in READS or (
            func in (aten._to_copy.default, aten.copy_.default)
            and _leaves_gpu(func, args, result)
            and not (kwargs or {}).get("non_blocking")
        )
        return result


def _leaves_gpu(func: Any, args: Sequence[Any], result: Tensor) -> bool:
    source = args[1] if func is aten.copy_.default else args[0]
    return source.device.type == "cuda" and result.device.type == "cpu"
