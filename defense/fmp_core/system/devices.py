"""Devices: what ``--device`` names, and what the hardware does fast."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fmp_core.errors import UserError

T = TypeVar("T")
Switch = tuple[Callable[[], Any], Callable[[Any], object], Any]  # what reads and what sets something of torch's, and a value


@dataclass(frozen=True)
class Device:
    """``device`` does the work; ``device_ids`` are the GPUs that were named, over which fine-tuning spreads."""

    device: torch.device
    device_ids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The hardware in words, for reports."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        about = Path("/proc/cpuinfo")
        model = re.search(r"^model name\s*: *(.*)", about.read_text(encoding="utf-8"), re.M) if about.is_file() else None
        return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads"

    @property
    def full_name(self) -> str:
        """The device and its hardware, as result files have it."""
        return f"{self.device} ({self.name})"


def choose_device(text: str) -> Device:
    """The device that :func:`named_device` reads, tried out; ``auto`` is the CPU, with a warning, if the GPU does not compute.

    Raises:
        UserError: not such a string, or no such device on this machine, or a GPU that does not compute.
    """
    device = named_device(text)
    gpus = device.device_ids or [device.device.index] if device.device.type == "cuda" else []
    fault = next(filter(None, map(fault_of_gpu, gpus)), "")
    if not fault:
        return device
    if text == "auto":
        logging.getLogger("fmp_core").warning("--device auto takes the CPU: the GPU does not compute (%s)", fault)
        return Device(torch.device("cpu"))
    raise UserError(f"--device {text}: the GPU does not compute ({fault}); choose another --device, or cpu.")


def named_device(text: str) -> Device:
    """Read BB's device strings: ``cpu``, ``cuda``, ``cuda:0``, ``cuda:0,1``; ``auto`` is CUDA where there is one.

    Raises:
        UserError: not such a string, or no such device on this machine.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return Device(torch.device("cpu"))
    match = re.fullmatch(r"cuda(?::(\d+(?:,\d+)*))?", text)
    if match is None:
        raise UserError(f"--device {text} is not a device; give cpu, cuda, cuda:0 or cuda:0,1.")
    ids = tuple(int(part) for part in (match[1] or "0").split(","))
    if len(set(ids)) < len(ids):
        raise UserError(f"--device {text} names a GPU twice.")
    count = torch.cuda.device_count()
    absent = next((i for i in ids if i >= count), None)
    if absent is not None:
        raise UserError(
            f"--device {text}: this machine has {count} CUDA device(s), so cuda:{absent} does not exist; try --device cpu."
        )
    return Device(torch.device("cuda", ids[0]), ids if match[1] else ())


def visible_gpus() -> list[str]:
    """The GPUs in torch's order, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible and count else [str(number) for number in range(count)]
    # CUDA stops at the first that does not exist; of parts of a GPU a process sees one, however many are named.
    return names if (visible or "").startswith("MIG") else names[:count]


@cache
def fault_of_gpu(index: int) -> str:
    """What a GPU says that does not compute, in a line; empty if it does. Torch lists those that it has no kernels for, too, or
    that another process has for itself."""
    try:
        torch.ones(2, device=torch.device("cuda", index)).add_(1).sum().item()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return str(error).strip().partition("\n")[0]
    return ""


def _cpu_has(feature: str) -> bool:
    probe = getattr(torch.cpu, f"_is_{feature}_supported", None)  # older torch cannot tell
    return probe is not None and bool(probe())


@cache
def has_amx() -> bool:
    """Whether this CPU has Intel's matrix instructions."""
    return _cpu_has("amx_tile")


_everywhere = True  # all processes that work together have it


def do_without_bfloat16() -> None:
    """From now on this process has no fast bfloat16, since one that it ranks with has none."""
    global _everywhere
    _everywhere = False


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; a CPU: unless ``ATEN_CPU_CAPABILITY`` limits torch. Several
    processes that work together have it all, or none."""
    if not _everywhere:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    limited = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return not limited and (has_amx() or _cpu_has("avx512_bf16"))


def choose_dtype(text: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, or ``auto``: bf16 where the device has it in hardware. Warns once of bf16 that is emulated."""
    fast = has_fast_bfloat16(device)
    if text == "bf16" and not fast:
        _warn_of_emulation()
    return torch.bfloat16 if text == "bf16" or (text == "auto" and fast) else torch.float32


@cache
def _warn_of_emulation() -> None:
    logging.getLogger("fmp_core").warning("--dtype bf16 is slower than fp32 here: this hardware has no bfloat16 arithmetic")


def rows_per_batch(device: torch.device) -> int:
    """Images per forward pass: as many as keep activations in a CPU's cache and all its threads busy, or a GPU."""
    return 512 if device.type == "cuda" else max(64, 2 * torch.get_num_threads())


def row_multiple(device: torch.device) -> int:
    """Batches are padded to a multiple of this: oneDNN splits their rows over the threads, and rounds odd shares otherwise."""
    return max(2, torch.get_num_threads()) if device.type == "cpu" else 1


def min_exact_rows(device: torch.device) -> int:
    """No batch has fewer images: with one thread oneDNN computes wide 1x1 convolutions differently below 16 rows."""
    return max(16, row_multiple(device)) if device.type == "cpu" else 1


def min_rows(device: torch.device) -> int:
    """Batches are halved down to this when memory runs out; below :func:`min_exact_rows` near ties may be decided otherwise."""
    return 2 if device.type == "cpu" else 1


def by_batch(count: int, rows: int, device: torch.device, work: Callable[[slice], T]) -> list[T]:
    """What ``work`` returns for each batch of ``count`` images: ``rows`` at a time, half as many once memory runs out."""
    found, done, fewest = list[T](), 0, min_rows(device)
    while done < count:
        part = slice(done, min(done + rows, count))
        try:
            found.append(work(part))
        except (RuntimeError, MemoryError) as error:
            if rows <= fewest or not is_out_of_memory(error):
                raise
            rows = max(fewest, rows // 2)
            continue
        done = part.stop
    return found


def to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """``tensors`` on the CPU, without gradients. The host waits for a GPU once, not for each of them."""
    tensors = [tensor.detach() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return copies


# What the CPU allocators, the CUDA driver and runtime, NCCL, cuBLAS and cuDNN say; only torch's own CUDA allocator has an
# exception type for it. The last two seldom have another cause on a GPU that computes.
OUT_OF_MEMORY = [
    *("can't allocate memory", "not enough memory", "out of memory", "Failed to CUDA calloc", "_ALLOC_FAILED"),
    *("CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED"),
]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or CPU memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """A block in which a GPU's convolutions use the same kernels every time, and no product of float32 is rounded to TF32 or
    bfloat16, on a CPU neither."""
    with _computing("ieee", [*_CUDNN, _attribute(torch.backends.cudnn, "enabled", True)]):
        yield


@contextmanager
def as_in_a_fresh_process() -> Iterator[None]:
    """A block in which torch computes alike, whatever a notebook has set: float32 as it is by default, gradients, no autocast,
    and cuDNN's same kernels every time (BB's ``fix_random`` asks for these, too). All is afterwards as it was."""
    plain: list[Switch] = [*_CUDNN, (torch.get_default_dtype, torch.set_default_dtype, torch.float32)]
    for kind in ("cpu", "cuda"):
        plain.append((partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind), False))
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with _computing("tf32", plain), outside, torch.enable_grad():
        yield


def _attribute(place: Any, name: str, value: Any) -> Switch:
    return partial(getattr, place, name), partial(setattr, place, name), value


_CUDNN = [_attribute(torch.backends.cudnn, "deterministic", True), _attribute(torch.backends.cudnn, "benchmark", False)]


@contextmanager
def _computing(cudnn: str, others: Sequence[Switch]) -> Iterator[None]:
    """A block in which ``others`` have their values, and products the precision of :func:`_precisions`.

    Torch's general switches, of all libraries and of CUDA's, say nothing meanwhile. They come first, one by one: what says
    nothing itself reads as the general one does, and would be left with that value of its own.
    """
    with ExitStack() as stack:
        for place in (torch.backends, torch.backends.cudnn):
            if hasattr(place, "fp32_precision"):  # torch >= 2.9
                stack.enter_context(_held([_attribute(place, "fp32_precision", "none")]))
        stack.enter_context(_held([*_precisions(cudnn), *others]))
        yield


def _precisions(cudnn: str) -> list[Switch]:
    """Products of float32 are float32's; in cuDNN they may be ``tf32``, which is torch's default, or ``ieee``."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        matrices = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
        return [matrices, _attribute(backends.cudnn, "allow_tf32", cudnn == "tf32")]
    places = [(place, "ieee") for place in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv)]
    places += [(backends.cudnn.conv, cudnn), (backends.cudnn.rnn, cudnn)]
    try:
        backends.cudnn.allow_tf32  # noqa: B018 - torch refuses to say where the new switches contradict this one
    except RuntimeError:
        older = []
    else:
        older = [_attribute(backends.cudnn, "allow_tf32", cudnn == "tf32")]
    return [*older, *(_attribute(place, "fp32_precision", value) for place, value in places)]


@contextmanager
def _held(switches: Sequence[Switch]) -> Iterator[None]:
    """A block in which each switch has its value."""
    before = [read() for read, _, _ in switches]
    try:
        for _, put, value in switches:
            put(value)
        yield
    finally:
        for (_, put, _), value in zip(switches, before, strict=True):
            put(value)
