"""A shared folder as on a cluster: `cluster/`, the environment, logs, and ranks with injected faults."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "cluster"
# Replacement of cluster/rank.py that injects faults and runs the original.
PLANTED_RANK = """
import json, os, runpy, sys
sys.path.insert(0, {root!r})
from tests.train import fault_injection
from tinyllama import hardware
hardware.peak_flops = lambda device, precision: None  # measured, it takes longer than a run of these tests
fault_injection.inject_into_losses(json.loads(os.environ.get("FAULTS", "[]")))
runpy.run_path({rank!r}, run_name="__main__")
"""


def make_site(folder: Path) -> Path:
    """Make a folder to launch from, with the project's own files except for the faults."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CLUSTER, folder / "cluster")
    (folder / "logs").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    rank = PLANTED_RANK.format(root=str(CLUSTER.parent), rank=str(CLUSTER / "rank.py"))
    (folder / "cluster/rank.py").write_text(rank)
    return folder


def lint_errors(script: str) -> str:
    """Return the errors of bash and shellcheck (installed next to Python) for a script."""
    found = ""
    for command in (["bash", "-n"], [str(Path(sys.executable).parent / "shellcheck"), "-"]):
        done = subprocess.run(command, input=script, check=False, capture_output=True, text=True)
        found += done.stdout + done.stderr
    return found


def torchrun_options(script: str, variables: dict[str, str]) -> list[str]:
    """Return the torchrun options of a launch script, `torchrun=( … )`, expanded by bash."""
    options = "torchrun=(" + script.partition("torchrun=(")[2].partition("\n)")[0] + "\n)"
    shell = ["bash", "-euc", options + "\nprintf '%s\\n' \"${torchrun[@]}\""]
    return subprocess.run(shell, check=True, capture_output=True, text=True, env=variables).stdout.splitlines()


def under_a_name(name: str, names_file: Path, command: list[str]) -> list[str]:
    """Return a command that runs with another host name and `names_file` as /etc/hosts."""
    enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", enter, "sh", str(names_file), name, *command]


@contextmanager
def started(command: list[str], site: Path, log: Path, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a launcher in a site with its output in a log; kill its processes at the end."""
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=site,
            env=os.environ | {"OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its ranks end with it
        process.wait()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
