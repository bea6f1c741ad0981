"""Hardware specs of GPU names, and the compilers that torch.compile needs."""

import shutil
from pathlib import Path

import pytest
import torch

from tinyllama.hardware import can_compile, inference_precision, peak_flops, spec_for_device


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA T400 4GB", None),
        ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32g"),
        ("Tesla V100S-PCIE-32GB", None),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_variants_of_a_gpu_have_their_own_spec(device: str, name: str | None) -> None:
    spec = spec_for_device(device)
    assert (spec.name if spec else None) == name


@pytest.mark.parametrize(
    ("device", "capability", "wanted", "used"),
    [
        ("cuda", (7, 5), torch.bfloat16, torch.float16),
        ("cuda", (7, 5), torch.float32, torch.float32),
        ("cuda", (6, 0), torch.bfloat16, torch.float32),
        ("cuda", (8, 0), torch.bfloat16, torch.bfloat16),
        ("cuda", (8, 0), torch.float16, torch.float16),
        ("cpu", None, torch.bfloat16, torch.bfloat16),
        ("cpu", None, torch.float16, torch.float32),
    ],
)
def test_models_are_evaluated_in_a_precision_that_the_device_does_not_emulate(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int] | None,
    wanted: torch.dtype,
    used: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert inference_precision(torch.device(device), wanted) == used


def test_peak_of_fp16_is_that_of_bf16_on_a_gpu_and_unknown_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda")
    assert peak_flops(gpu, torch.float16) == peak_flops(gpu, torch.bfloat16) == 989e12
    assert peak_flops(gpu, torch.float32) == 67e12
    assert peak_flops(torch.device("cpu"), torch.float16) is None


def test_gpu_without_a_c_compiler_or_older_than_volta_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # Python's headers
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert can_compile(torch.device("cuda"))
    assert not can_compile(torch.device("cpu"))  # c++ is missing
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not can_compile(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(torch.device("cuda"))
