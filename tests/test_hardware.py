"""Hardware specs of GPU names, and the compilers that torch.compile needs."""

import shutil
from pathlib import Path

import pytest
import torch

from tinyllama.hardware import can_compile, spec_for_device


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", None),
    ],
)
def test_variants_of_a_gpu_have_their_own_spec(device: str, name: str | None) -> None:
    spec = spec_for_device(device)
    assert (spec.name if spec else None) == name


def test_gpu_without_a_c_compiler_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # Python's headers
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    assert can_compile(torch.device("cuda"))
    assert not can_compile(torch.device("cpu"))  # c++ is missing
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(torch.device("cuda"))
