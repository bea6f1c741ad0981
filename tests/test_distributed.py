"""Devices of ranks, and the timeouts of their process groups."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tinyllama import distributed, hardware
from tinyllama.distributed import check_same_device_type, init_distributed, select_device
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.plan.measure import detect_hardware


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that torch cannot use, as with an old driver or a torch built for CPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_devices", lambda: [Path("/dev/nvidia0")])


@pytest.mark.usefixtures("unusable_gpu")
@pytest.mark.parametrize("visible", [None, "99"])
def test_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match=r"^CUDA: .*CUDA_VISIBLE_DEVICES="):
        select_device(0)


@pytest.mark.usefixtures("unusable_gpu")
@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_select_the_cpu(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert select_device(0) == torch.device("cpu")


@pytest.mark.parametrize(("capability", "is_supported"), [((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_gpu_older_than_torchs_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_supported: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    if is_supported:
        assert select_device(1) == torch.device("cuda", 1)
        return
    with pytest.raises(InputError, match=r"^CUDA: .*V100.*7\.0.*older CUDA version"):
        select_device(1)


@pytest.mark.usefixtures("unusable_gpu")
def test_plan_does_not_measure_the_cpu_instead_of_an_unusable_gpu() -> None:
    with pytest.raises(InputError, match=r"^CUDA: "):
        detect_hardware()


def test_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match=r"^CUDA: .*4 GPUs.*--nproc-per-node 4"):
        select_device(4)


def test_rank_without_the_device_type_of_rank_0_is_refused() -> None:
    store = dist.HashStore()
    check_same_device_type(store, 0, torch.device("cuda", 0))
    check_same_device_type(store, 1, torch.device("cuda", 1))
    with pytest.raises(InputError, match=r"^rank 2: .*cpu.*cuda"):
        check_same_device_type(store, 2, torch.device("cpu"))


def test_groups_of_replicas_have_the_timeout_of_the_watchdog() -> None:
    program = Path(__file__).with_name("mesh_timeouts_program.py")
    done = subprocess.run([sys.executable, str(program), "7"], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["14.0", "14.0"]  # shards, replicas


@pytest.mark.parametrize(
    ("device", "error", "is_destroyed"),
    [
        ("cuda", None, True),
        ("cuda", RunStoppedError("SIGTERM: saved", signal="SIGTERM"), True),
        ("cuda", RunStoppedError("the disk is full"), False),
        ("cuda", InputError("a damaged store"), False),
        ("cpu", InputError("a damaged store"), True),
    ],
)
def test_groups_that_could_wait_for_blocked_ranks_are_not_destroyed(
    monkeypatch: pytest.MonkeyPatch, device: str, error: Exception | None, is_destroyed: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "select_device", lambda rank: torch.device(device))
    monkeypatch.setattr(distributed, "die_with_torchrun", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with pytest.raises(type(error)) if error else nullcontext(), init_distributed(60):
        if error:
            raise error
    assert bool(calls) == is_destroyed
