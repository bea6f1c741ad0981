"""Launches as on a cluster: a work folder with ranks that inject faults, launch scripts, host names."""

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


def make_work_dir(folder: Path) -> Path:
    """Make a folder to launch from, as on a cluster: the project's files, with ranks that inject faults."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CLUSTER, folder / "cluster")
    (folder / "logs").mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "cluster/rank.py").unlink()
    (folder / "cluster/rank.py").symlink_to(Path(__file__).with_name("faulty_rank.py"))
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


def with_host_name(name: str, names_file: Path, command: list[str]) -> list[str]:
    """Return a command that runs with another host name and `names_file` as /etc/hosts."""
    enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", enter, "sh", str(names_file), name, *command]


@contextmanager
def started(command: list[str], folder: Path, log: Path, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a launcher in a folder with its output in a log; kill its processes at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
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
