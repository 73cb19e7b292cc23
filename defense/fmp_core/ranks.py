"""Several processes that rank one model together, as ``torchrun --nproc_per_node=N`` starts them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> torch.device:
    """Join the processes torchrun started, if it did: nccl on CUDA (one GPU each), gloo on CPU. Returns this one's device."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def together() -> bool:
    return dist.is_available() and dist.is_initialized()


def leads() -> bool:
    """Whether this is the process that fine-tunes, evaluates and writes."""
    return not together() or dist.get_rank() == 0


def share(total: int) -> Tensor:
    """The positions this process scores, bool ``[total]``: every n-th, so that all layers are spread evenly."""
    positions = torch.arange(total)
    return positions % dist.get_world_size() == dist.get_rank() if together() else positions >= 0


def add_up(*sums: Tensor) -> None:
    """Sum over all processes, in place. Each position was scored by one process and is 0 elsewhere, so the sum is exact."""
    if together():
        for tensor in sums:
            dist.all_reduce(tensor)


def finish() -> None:
    if together():
        dist.destroy_process_group()
