"""Several processes that rank one model together, as ``torchrun --nproc_per_node=N`` starts them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from .compute import Compute


def join(compute: Compute) -> Compute:
    """Join the processes torchrun started, if it did: nccl on CUDA (one GPU each), gloo on CPU. Returns this one's share."""
    if "RANK" not in os.environ:
        return compute
    device = compute.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Compute(device)


def together() -> bool:
    """Whether this process ranks together with others."""
    return dist.is_available() and dist.is_initialized()


def leads() -> bool:
    """Whether this is the process that fine-tunes, evaluates and writes."""
    return not together() or dist.get_rank() == 0


def share(wanted: Tensor) -> Tensor:
    """Of the positions ``wanted`` (bool ``[N]``), those this process scores: every n-th, so that layers are spread evenly."""
    if not together():
        return wanted
    return wanted & (wanted.cumsum(0) % dist.get_world_size() == dist.get_rank())


def combine(*sums: Tensor, least: Tensor) -> None:
    """Give every process all scores, in place: exact, since a map is scored by one process and 0 (``least``: inf) elsewhere."""
    if together():
        for tensor in sums:
            dist.all_reduce(tensor)
        dist.all_reduce(least, dist.ReduceOp.MIN)


def leave() -> None:
    """Part from the other processes, if there are any."""
    if together():
        dist.destroy_process_group()
