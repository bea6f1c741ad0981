"""The SkyPilot file: its scripts and torchrun options; `make check-clusters` checks that SkyPilot reads it."""

import subprocess
from typing import Any

import pytest
import yaml
from tests.cluster.launch import CLUSTER, lint_errors, torchrun_options

SKYPILOT: dict[str, Any] = yaml.safe_load((CLUSTER / "skypilot/train.yaml").read_text())


@pytest.mark.parametrize("script", ["setup", "run"])
def test_skypilot_scripts_pass_shellcheck(script: str) -> None:
    assert lint_errors("#!/usr/bin/env bash\n" + SKYPILOT[script]) == ""


def test_skypilot_starts_torchrun_like_slurm() -> None:
    of_slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "9400", "SLURM_GPUS_ON_NODE": "8", "nodes": "a1\na2"}
    of_skypilot = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "9400"}
    ours = torchrun_options(SKYPILOT["run"], of_skypilot | {"nodes": "a1\na2"})
    assert ours == torchrun_options((CLUSTER / "slurm/train.sbatch").read_text(), of_slurm)


@pytest.mark.parametrize("flags", ["", "--train.tokens 5M --name longer"])
def test_flags_reach_command_unchanged(flags: str) -> None:
    script = SKYPILOT["run"].replace("cd /work", "true").replace("exec ~/environment/bin/python", "printf '%s\\n'")
    variables = dict.fromkeys(("SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_TASK_ID"), "2")
    variables |= {"SKYPILOT_NODE_IPS": "a1\na2", "RECIPE": "demo", "FLAGS": flags}
    done = subprocess.run(["bash", "-euc", script], check=True, capture_output=True, text=True, env=variables)
    assert done.stdout.partition("rank.py\n")[2].split("\n") == ["train", "demo", *flags.split(), ""]


def test_saved_run_is_restarted() -> None:
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
