"""Which precision a device gets, and what counts as running out of memory."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.system import devices


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_bf16_from_ampere_on(capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert devices.has_fast_bfloat16(torch.device("cuda", 0)) == has


def test_bf16_is_chosen_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda _device: True)
    assert devices.choose_dtype("auto", cpu) == devices.choose_dtype("bf16", cpu) == torch.bfloat16
    assert devices.choose_dtype("fp32", cpu) == torch.float32
    assert not caplog.records
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda _device: False)
    devices._warn_of_emulation.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fmp_core"):
        assert devices.choose_dtype("auto", cpu) == torch.float32
        assert not caplog.records
        assert devices.choose_dtype("bf16", cpu) == devices.choose_dtype("bf16", cpu) == torch.bfloat16
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["--dtype bf16 is slower than fp32 here"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), True),
        (RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), True),  # seen on a crowded H100
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("NCCL error: Failed to CUDA calloc async 24 bytes"), True),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."), True),  # on Windows
        (ValueError("the record says: out of memory"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool):
    assert devices.is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    "asked",
    [
        "torch.set_float32_matmul_precision('high')",
        "products.allow_tf32 = True",
        pytest.param(
            "products.fp32_precision = 'tf32'",
            marks=pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since torch 2.9"),
        ),
    ],
)
def test_no_product_is_rounded_where_convolutions_are_exact(asked: str):
    """Containers and callers may ask for TF32 in matrix products, in one of three ways; afterwards they have it again."""
    code = (
        "import torch\n"
        "from fmp_core.system.devices import exact_convolutions\n"
        "products = torch.backends.cuda.matmul\n"
        "name = 'fp32_precision' if hasattr(products, 'fp32_precision') else 'allow_tf32'\n"
        f"{asked}\n"
        "before = getattr(products, name)\n"
        "for _ in range(2):\n"
        "    with exact_convolutions(): print(getattr(products, name), before, torch.backends.cudnn.allow_tf32)\n"
        "assert getattr(products, name) == before\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "defense")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines() in (["ieee tf32 False"] * 2, ["False True False"] * 2), ran.stderr


def test_devices_are_read_as_backdoorbench_writes_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(devices, "fault_of_gpu", lambda _index: "")
    for text, index, named in (("cuda", 0, ()), ("cuda:1", 1, (1,)), ("cuda:2,0", 2, (2, 0))):
        assert devices.choose_device(text) == devices.Device(torch.device("cuda", index), named)
    for text, says in (
        ("cuda:0,3", "so cuda:3 does not exist"),
        ("cuda:1,1", "names a GPU twice"),
        ("cuda:", "is not a device"),
    ):
        with pytest.raises(UserError, match=says):
            devices.choose_device(text)
    for there in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert devices.choose_device("auto").device.type == ("cuda" if there else "cpu")


def test_a_gpu_that_does_not_compute_is_refused_or_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """This torch may have no kernels for it: it is listed, and its first computation fails."""

    def ones(_size: int, device: torch.device) -> torch.Tensor:
        if device.index == 1:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
        if device.index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(2)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.ones", ones)
    monkeypatch.setattr(devices, "fault_of_gpu", devices.fault_of_gpu.__wrapped__)  # not kept for other tests
    assert devices.choose_device("auto").device == devices.choose_device("cuda:0").device == torch.device("cuda", 0)
    with pytest.raises(
        UserError, match=r"--device cuda:0,1: .* \(CUDA error: no kernel image .* on the device\); choose another"
    ):
        devices.choose_device("cuda:0,1")
    with pytest.raises(torch.OutOfMemoryError):  # another device is no remedy that is taken unasked
        devices.choose_device("cuda:2")
    monkeypatch.setattr(devices, "fault_of_gpu", lambda _index: "no kernel image")
    with caplog.at_level(logging.WARNING, logger="fmp_core"):
        assert devices.choose_device("auto").device.type == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "--device auto takes the CPU: the GPU does not compute (no kernel image)"
    ]


@pytest.mark.parametrize(("capability", "fast"), [("DEFAULT", False), ("AVX2", False), ("AVX512", True)])
def test_a_limit_on_torch_is_one_on_bfloat16(capability: str, fast: bool, monkeypatch: pytest.MonkeyPatch):
    """Whatever the CPU could do: ATEN_CPU_CAPABILITY is set to compare machines."""
    monkeypatch.setattr(devices, "has_amx", lambda: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert devices.has_fast_bfloat16(torch.device("cpu")) == fast
