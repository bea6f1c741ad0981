"""A folder as the nodes of a cluster share it: `cluster/`, the environment, logs, and ranks that faults can strike."""

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
# What the launchers start as cluster/rank.py: the real one, after faults are planted.
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
    """Lay out a folder to start from; the files in it are the project's own, but for the faults."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CLUSTER, folder / "cluster")
    (folder / "logs").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    rank = PLANTED_RANK.format(root=str(CLUSTER.parent), rank=str(CLUSTER / "rank.py"))
    (folder / "cluster/rank.py").write_text(rank)
    return folder


def complaints(script: str) -> str:
    """What bash and shellcheck (a development dependency, beside Python) say of a script."""
    found = ""
    for command in (["bash", "-n"], [str(Path(sys.executable).parent / "shellcheck"), "-"]):
        done = subprocess.run(command, input=script, check=False, capture_output=True, text=True)
        found += done.stdout + done.stderr
    return found


def torchrun_options(script: str, variables: dict[str, str]) -> list[str]:
    """The torchrun options of a launch script, `torchrun=( … )`, as bash makes them of some variables."""
    options = "torchrun=(" + script.partition("torchrun=(")[2].partition("\n)")[0] + "\n)"
    shell = ["bash", "-euc", options + "\nprintf '%s\\n' \"${torchrun[@]}\""]
    return subprocess.run(shell, check=True, capture_output=True, text=True, env=variables).stdout.splitlines()


def under_a_name(name: str, names_file: Path, command: list[str]) -> list[str]:
    """A command in namespaces where this machine has that name and `names_file` is /etc/hosts."""
    enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", enter, "sh", str(names_file), name, *command]


@contextmanager
def started(command: list[str], site: Path, log: Path, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """A launcher that works in a site and says what it says in a log; nothing of it is left."""
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
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
