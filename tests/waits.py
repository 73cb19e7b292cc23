"""Counting what makes the host wait for a device: values read from it, one by one or copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}  # the position of the source


class CountWaits(TorchDispatchMode):
    """While active, counts in ``count``: a number read from a tensor (on any device, so that tests on a CPU see it), sizes that
    depend on values, and copies between a GPU and the host, in either direction, that the host waits for."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = func in COPIES and not (kwargs or {}).get("non_blocking")
        self.count += func in READS or (copied and args[COPIES[func]].device.type != result.device.type)
        return result
