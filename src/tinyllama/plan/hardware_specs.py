"""What GPUs can do, from their makers' data sheets: one row each, with its source.

Peaks are dense: bf16 with float32 sums, and float32 without TF32, as torch multiplies unless told otherwise. Memory is
the nominal one in units of 10^9 bytes, bandwidths are of one direction. A CPU's row is measured, for want of a sheet.
"""

from dataclasses import dataclass, replace

from tinyllama.errors import InputError


@dataclass(frozen=True)
class Machine:
    """One GPU of a kind, or this machine's CPU."""

    name: str
    bf16_flops: float
    fp32_flops: float
    """FLOP/s of dense products."""
    memory_bytes: float
    link_bytes_per_second: float
    """To the other GPUs of its node, one direction: NVLink, or PCIe 4.0 x16."""
    network_bytes_per_second: float
    """Of a node of eight to the others, one direction: DGX's own, or one port of 100 Gbit/s."""
    watts: float | None
    """Of the board, at most."""
    source: str
    is_cpu: bool = False

    def peak_flops(self, precision: str) -> float:
        """FLOP/s that an MFU is a share of, where training computes in `bf16` or `fp32`."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    def shared_by(self, processes: int) -> "Machine":
        """What one process has of a CPU that several share; a GPU is one process's."""
        if not self.is_cpu:
            return self
        parts = {name: getattr(self, name) / processes for name in ("bf16_flops", "fp32_flops", "memory_bytes")}
        return replace(self, **parts)


_PCIE, _NIC_100_GBIT = 32e9, 12.5e9
_A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100 data sheet: 8 x 200 Gbit/s"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM5); DGX H100 data sheet: 8 x 400 Gbit/s"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet (SXM); DGX H200 data sheet: 8 x 400 Gbit/s"
_B200 = "NVIDIA HGX B200 and DGX B200 data sheets, of 8 GPUs: 1,440 GB, 36 PFLOP/s sparse bf16, 8 x 400 Gbit/s"
# Their traffic goes through the host's memory, so that it may reach half of what is counted here.
_ADA = "NVIDIA Ada GPU Architecture white paper, appendix A; PCIe without peer-to-peer"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture white paper, table 9; PCIe without peer-to-peer"

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100-40g", 312e12, 19.5e12, 40e9, 300e9, 200e9, 400, _A100),
        Machine("a100-80g", 312e12, 19.5e12, 80e9, 300e9, 200e9, 400, _A100),
        Machine("h100", 989e12, 67e12, 80e9, 450e9, 400e9, 700, _H100),
        Machine("h200", 989e12, 67e12, 141e9, 450e9, 400e9, 700, _H200),
        Machine("b200", 2250e12, 75e12, 180e9, 900e9, 400e9, 1000, _B200),
        Machine("l40s", 362e12, 91.6e12, 48e9, _PCIE, _NIC_100_GBIT, 350, "NVIDIA L40S data sheet"),
        Machine("4090", 165e12, 82.6e12, 24e9, _PCIE, _NIC_100_GBIT, 450, _ADA),
        Machine("3090", 71e12, 35.6e12, 24e9, _PCIE, _NIC_100_GBIT, 350, _AMPERE),
    )
}
GPUS_PER_NODE = 8


def machine_named(name: str) -> Machine:
    """A row of the table by its name, or this machine by `cpu`. Raises InputError for another name."""
    if name == "cpu":
        return this_cpu()
    if name not in MACHINES:
        raise InputError(
            f"--hardware {name}: not known; name one of {', '.join(MACHINES)}, or cpu, which is this machine's"
        )
    return MACHINES[name]


def spec_for_device(device_name: str) -> Machine | None:
    """The row of the GPU that a driver calls so, such as `NVIDIA A100-SXM4-80GB`; None where there is none."""
    words = device_name.lower()
    size = "-40g" if "40gb" in words else "-80g"
    found = (machine for name, machine in MACHINES.items() if name.partition("-")[0] in words)
    return next(
        (machine for machine in found if not machine.name.startswith("a100") or machine.name.endswith(size)), None
    )


def this_cpu() -> Machine:
    """This machine's CPU, its products measured now, which takes a second."""
    import torch  # noqa: PLC0415 - which no other row needs

    from tinyllama.hardware import benchmark_matmul_flops, total_memory_bytes  # noqa: PLC0415

    bf16, fp32 = benchmark_matmul_flops(torch.bfloat16), benchmark_matmul_flops(torch.float32)
    source = "products of 2048 x 2048 matrices on it, just now"
    return Machine("cpu", bf16, fp32, total_memory_bytes(), 10e9, 12.5e9, None, source, is_cpu=True)
