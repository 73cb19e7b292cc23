"""BackdoorBench's mixed precision (its ``amp``, for CUDA only) on a CPU, in bfloat16. Loaded by ``shims.py``."""

from __future__ import annotations

from typing import Any

import torch

FLOAT32 = (  # operators for which torch's autocast leaves bfloat16 on CUDA, but not on CPUs
    *("softmax.int", "log_softmax.int", "exp", "log", "log1p", "log2", "log10", "reciprocal", "rsqrt"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "sum", "sum.dim_IntList", "cumsum", "prod", "prod.dim_int"),
    *("linalg_vector_norm", "cosine_similarity", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "nll_loss"),
)
ON_CPUS = torch.library.Library("aten", "IMPL", "AutocastCPU")


def begin() -> None:
    """Compute convolutions and matrix products in bfloat16 from now on, and losses in float32.

    In bfloat16 a probability above 0.998 is 1, and the logarithm of the rest, which sau takes, minus infinity.

    Autocast keeps copies of weights until its outermost context is left, which this one is not: they would stay those before
    the first step. BackdoorBench's own contexts would turn that on again.
    """
    for name in FLOAT32:
        operator, _, overload = name.partition(".")
        ON_CPUS.impl(name, _in_float32(getattr(getattr(torch.ops.aten, operator), overload or "default")))
    torch.autocast("cpu", torch.bfloat16, cache_enabled=False).__enter__()
    torch.set_autocast_cache_enabled = lambda enabled: None
    to_numpy = torch.Tensor.numpy  # which has no bfloat16; ac, spectral and npd ask for activations

    def numpy(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return to_numpy(_float32(self), *args, **kwargs)

    setattr(torch.Tensor, "numpy", numpy)  # noqa: B010 - assigning to a method is what mypy forbids


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _in_float32(operator: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operator(*map(_float32, args), **kwargs)

    return call
