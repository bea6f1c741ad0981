"""Replacement of cluster/rank.py that injects the faults of the variable FAULTS, a JSON list."""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.train import fault_injection  # noqa: E402

from tinyllama import hardware  # noqa: E402

hardware.peak_flops = lambda device, precision: None  # measuring the peak takes longer than a run of these tests
fault_injection.inject_into_losses(json.loads(os.environ.get("FAULTS", "[]")))
runpy.run_path(str(ROOT / "cluster/rank.py"), run_name="__main__")
