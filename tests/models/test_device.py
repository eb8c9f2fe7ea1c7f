"""Devices and precisions: the user's word, what it becomes, and why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import device
from pipeline.errors import UsageError


def _cuda(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def _no_cuda(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def fail() -> None:
        raise RuntimeError(message)

    _cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.cuda, "init", fail)


def _cpu_info(monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str) -> None:
    (folder / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: fpu {flags}\nprocessor\t: 1\n")
    monkeypatch.setattr(device, "_CPU_INFO", folder / "cpuinfo")


def test_auto_takes_the_gpu_when_torch_can_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch, 2)
    assert device.choose_device("auto") == "cuda:0"
    assert device.choose_device("cuda") == "cuda:0"
    assert device.choose_device("cuda:1") == "cuda:1"


def test_auto_takes_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_cuda(monkeypatch, "No CUDA GPUs are available")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.choose_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose_device("auto") == "mps"


def test_a_named_gpu_is_refused_with_torchs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_cuda(monkeypatch, "Found no NVIDIA driver on your system. Please check that ...\nmore")
    with pytest.raises(UsageError, match=r"device cuda: Found no NVIDIA driver on your system\n"):
        device.choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UsageError, match="was built without CUDA"):
        device.choose_device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "cuda:²"])
def test_an_unknown_device_lists_the_choices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _cuda(monkeypatch, 1)
    with pytest.raises(UsageError, match=r"unknown device[\s\S]*cuda:N"):
        device.choose_device(name)


def test_a_gpu_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda(monkeypatch, 1)
    with pytest.raises(UsageError, match=r"cuda:1: this machine shows 1 CUDA device"):
        device.choose_device("cuda:1")


@pytest.mark.parametrize(("flags", "precision"), [("avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), ("", "fp32")])
def test_a_cpu_runs_bf16_when_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, precision: str
) -> None:
    _cpu_info(monkeypatch, tmp_path, f"avx512f {flags}")
    assert device.choose_precision("auto", "cpu") == precision
    assert device.choose_precision("fp32", "cpu") == "fp32"
    assert device.choose_precision("bf16", "cpu") == "bf16"


def test_a_system_without_cpuinfo_runs_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_CPU_INFO", tmp_path / "none")
    assert device.choose_precision("auto", "cpu") == "fp32"
    assert device.cpu_name()


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_runs_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    _cuda(monkeypatch, 1, capability)
    assert device.choose_precision("auto", "cuda:0") == precision


def test_an_unknown_precision_lists_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'fp16'[\s\S]*auto, fp32, bf16"):
        device.choose_precision("fp16", "cpu")


def test_the_summary_names_the_hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _cpu_info(monkeypatch, tmp_path, "avx512_bf16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert device.device_summary("cpu") == "cpu (Test CPU, 1 thread, bf16)"
    assert device.device_summary("cpu", "fp32") == "cpu (Test CPU, 1 thread, fp32)"
    _cuda(monkeypatch, 1)
    assert device.device_summary("cuda:0") == "cuda:0 (NVIDIA H200, bf16)"
