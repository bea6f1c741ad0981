"""How fast: seconds of a step from an MFU or from a measurement, and whether FSDP's traffic hides behind computing.

Traffic is what `train/distributed.py` causes for each micro-batch: blocks gathered for the forward and the backward
pass, the root once, gradients reduced in float32, and between replicas (HSDP) their sums.
"""

import math
from dataclasses import dataclass

from tinyllama.hardware import GPUS_PER_NODE, HardwareSpec
from tinyllama.model.flops import num_parameters
from tinyllama.plan.memory import Workload

_LINK_STEP_SECONDS, _NETWORK_STEP_SECONDS = 3.4e-6, 14e-6
"""Of one step of a ring or a tree, over NVLink and between nodes: NCCL's own (src/graph/tuning.cc, hwLatencies)."""


@dataclass(frozen=True)
class Speed:
    """Of one micro-batch and one step, in seconds."""

    compute_seconds: float
    """Of a micro-batch."""
    network_seconds: float
    """Of a micro-batch's traffic, at the full bandwidth."""
    step_seconds: float

    @property
    def is_overlapped(self) -> bool:
        """Whether the traffic takes no longer than the computing beside it."""
        return self.network_seconds <= self.compute_seconds


def speed(compute_seconds: float, update_seconds: float, micro_batches: int, network_seconds: float) -> Speed:
    """A step of so many micro-batches, each as long as the longer of computing and traffic, and one update."""
    step = micro_batches * max(compute_seconds, network_seconds) + update_seconds
    return Speed(compute_seconds, network_seconds, step)


def shard_traffic_bytes(load: Workload) -> float:
    """Bytes that a GPU receives from its shard group for one micro-batch."""
    share = (load.shards - 1) / load.shards
    blocks = load.shape.layers * load.block_parameters
    gathered = load.element_bytes * (2 * blocks + load.root_parameters)
    return share * (gathered + 4 * (blocks + load.root_parameters))


def replica_traffic_bytes(load: Workload, replicas: int) -> float:
    """Bytes that a GPU receives from the other replicas for one micro-batch: a ring's sum of its float32 share."""
    return 2 * (replicas - 1) / replicas * 4 * num_parameters(load.shape, load.vocab_size) / load.shards


def network_seconds(load: Workload, replicas: int, machine: HardwareSpec) -> float:
    """Seconds of one micro-batch's traffic where nothing else uses the links: the bytes, and each collective's steps.

    Within a node over its links; between nodes a ring over all of a node's ports, so that its bandwidth is the node's
    (NVIDIA's nccl-tests, PERFORMANCE.md, "bus bandwidth"). Replicas lie on other nodes once a shard group fills one.
    """
    return _bytes_seconds(load, replicas, machine) + _latency_seconds(load, replicas)


def _bytes_seconds(load: Workload, replicas: int, machine: HardwareSpec) -> float:
    between = min(machine.link_bytes_per_second, machine.network_bytes_per_second)
    within_node = load.shards <= GPUS_PER_NODE
    seconds = shard_traffic_bytes(load) / (machine.link_bytes_per_second if within_node else between)
    groups_a_node = max(1, GPUS_PER_NODE // load.shards)
    if replicas <= groups_a_node:
        return seconds + replica_traffic_bytes(load, replicas) / machine.link_bytes_per_second
    sharing = min(GPUS_PER_NODE, load.shards)  # GPUs of a node that send their shares at the same time
    return seconds + replica_traffic_bytes(load, replicas) * sharing / machine.network_bytes_per_second


def _latency_seconds(load: Workload, replicas: int) -> float:
    """Of all steps: rings gather each block twice and reduce it once, and the root once; trees sum the replicas."""
    blocks = load.shape.layers
    nodes = -(-load.shards // GPUS_PER_NODE)
    sharding = (load.shards - nodes) * _LINK_STEP_SECONDS + (nodes - 1) * _NETWORK_STEP_SECONDS
    within_node = load.shards * replicas <= GPUS_PER_NODE
    summing = 2 * math.ceil(math.log2(replicas)) * (_LINK_STEP_SECONDS if within_node else _NETWORK_STEP_SECONDS)
    return (3 * blocks + 2) * sharding + (blocks + 1) * summing
