"""Several processes that rank one model together, as ``torchrun --nproc_per_node=N`` starts them."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fmp_core.errors import UserError, in_one_line
from fmp_core.system.devices import (
    Device,
    choose_device,
    do_without_bfloat16,
    fault_of_gpu,
    has_fast_bfloat16,
    is_out_of_memory,
    named_device,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets; clusters set some of these too


def join(text: str) -> Device:
    """Join the processes torchrun started, if it did: nccl on CUDA, gloo on CPU. Returns this one's share of ``--device``.

    On CUDA each takes one of the GPUs that ``text`` names, or of all if it names none.

    Raises:
        UserError: as :func:`~.devices.choose_device`, or there are fewer GPUs than processes.
    """
    if not all(name in os.environ for name in TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        return choose_device(text)
    device = named_device(text)
    own = device.device
    if own.type == "cuda":
        gpus = device.device_ids or range(torch.cuda.device_count())
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > len(gpus):
            raise UserError(f"torchrun started more processes than there are GPUs; give --nproc_per_node={len(gpus)}.")
        own = torch.device("cuda", gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)])
        torch.cuda.set_device(own)
        if fault := fault_of_gpu(own.index):
            raise UserError(f"--device {text}: {own} does not compute ({fault}); name others, or --device cpu.")
    if not dist.is_initialized():
        # Long, because the others wait where the first one waits for a lock (--wait).
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timedelta(days=7))
        if not all_agree(has_fast_bfloat16(own)):  # they must take the same steps, in one precision
            do_without_bfloat16()
    return Device(own)


def is_distributed() -> bool:
    """Whether this process ranks together with others."""
    return dist.is_available() and dist.is_initialized()


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_leader() -> bool:
    """Whether this is the process that fine-tunes, evaluates and writes."""
    return _rank_and_size()[0] == 0


def all_agree(answer: bool) -> bool:
    """Whether every process answers yes: they may see different cache files, but must take the same branch."""
    if not is_distributed():
        return answer
    answers = torch.tensor([int(answer)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    with _connected():
        dist.all_reduce(answers, dist.ReduceOp.MIN)
    return bool(answers.item())


def my_share(maps: Tensor) -> Tensor:
    """Of the feature ``maps`` (bool ``[N]``), those this process scores: every n-th, so that layers are spread evenly."""
    rank, size = _rank_and_size()
    return maps & (maps.cumsum(0) % size == rank)


def share_name() -> str:
    """Which share of the maps this process scores, for names of files."""
    return "{}of{}".format(*_rank_and_size())


def combine(*sums: Tensor, least: Tensor | None = None) -> None:
    """Give every process all scores, in place: exact, since one process found each and it is 0 (``least``: inf) elsewhere."""
    if not is_distributed():
        return
    with _connected():
        for tensor in sums:
            dist.all_reduce(tensor)
        if least is not None:
            dist.all_reduce(least, dist.ReduceOp.MIN)


def total(seconds: float) -> float:
    """The sum over all processes."""
    if not is_distributed():
        return seconds
    value = torch.tensor([seconds], device="cuda" if dist.get_backend() == "nccl" else "cpu", dtype=torch.float64)
    with _connected():
        dist.all_reduce(value)
    return float(value)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and nccl report a lost connection
        if is_out_of_memory(error):
            raise
        nccl = ", or NCCL_DEBUG=INFO if none did" if dist.get_backend() == "nccl" else ""
        raise UserError(
            f"Another process of torchrun ended early ({in_one_line(error)}); it says why{nccl}. "
            "Run the same command again to go on from here."
        ) from None


def leave(failed: bool = False) -> None:
    """Part from the other processes, if there are any.

    With nccl that waits for all of them, and they for this one's scores if it ``failed``: it only ends then, which makes
    torchrun end them.
    """
    if not is_distributed():
        return
    if failed and dist.get_backend() == "nccl":
        atexit.register(_end_at_once)
    else:
        dist.destroy_process_group()


def _end_at_once() -> None:
    """Without parting from the others, which torch does at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
