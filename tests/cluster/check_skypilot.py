"""Have SkyPilot itself read cluster/skypilot/train.yaml, without a cloud: what `make check-clusters` runs."""

import sys
from pathlib import Path

import sky  # type: ignore[import-not-found]

FILE = Path(__file__).parents[2] / "cluster/skypilot/train.yaml"


def main() -> str:
    """What is wrong, or nothing."""
    task = sky.Task.from_yaml(str(FILE))  # which raises on what its schema lacks
    (resources,) = task.resources
    read = (task.num_nodes, resources.accelerators, resources.use_spot, resources.job_recovery)
    expected = (2, {"A100": 8}, True, {"strategy": "FAILOVER", "recover_on_exit_codes": [75]})
    return "" if read == expected else f"{FILE}: SkyPilot read {read}, not {expected}"


if __name__ == "__main__":
    sys.exit(main() or None)
