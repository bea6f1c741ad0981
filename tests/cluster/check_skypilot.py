"""Check that SkyPilot reads cluster/skypilot/train.yaml, without a cloud; run by `make check-clusters`."""

import sys
from pathlib import Path

import sky  # type: ignore[import-not-found]

FILE = Path(__file__).parents[2] / "cluster/skypilot/train.yaml"


def main() -> str:
    """Return the problem, or an empty string."""
    task = sky.Task.from_yaml(str(FILE))  # raises for fields that its schema lacks
    (resources,) = task.resources
    read = (task.num_nodes, resources.accelerators, resources.use_spot, resources.job_recovery)
    expected = (2, {"A100": 8}, True, {"strategy": "FAILOVER", "recover_on_exit_codes": [75]})
    return "" if read == expected else f"{FILE}: SkyPilot read {read}, not {expected}"


if __name__ == "__main__":
    sys.exit(main() or None)
