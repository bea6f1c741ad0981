"""A Slurm cluster of two nodes on this machine, with its daemons in the foreground.

The slurmd of a node runs in UTS and mount namespaces with the node's name and an /etc/hosts that lists both nodes.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.cluster.launch import with_host_name

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "unshare")
NODES = {"node1": "127.0.0.1", "node2": "127.0.0.2"}
LIMIT_SECONDS = 90.0
"""Limit for each wait, far above the usual duration."""
SLURM_CONF = """
ClusterName=small
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=2
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=64 RealMemory=8000 Gres=gpu:1\n"


def missing() -> str:
    """Return why Slurm cannot run here, or an empty string."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if lacking := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"needs {', '.join(lacking)}"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-um", "true"], check=False, capture_output=True).returncode:
        return "needs the rights for namespaces"
    return ""


@contextmanager
def slurm_cluster(port: int) -> Iterator[dict[str, str]]:
    """Yield the environment for `sbatch` and similar programs of a new cluster, which uses the ports from `port` on."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # its sockets' paths must be short
        write_configuration(Path(folder), port)
        with daemons(Path(folder)) as variables:
            yield variables


@contextmanager
def daemons(folder: Path) -> Iterator[dict[str, str]]:
    """Start all daemons and yield their environment once both nodes are idle."""
    log = folder / "daemons.log"
    variables = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    with ExitStack() as stack:
        munge = folder / "munge"
        places = [f"--{name}={munge / name}" for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
        commands = [["munged", "--foreground", "--force", *places], ["slurmctld", "-D"]]
        commands += [with_host_name(name, folder / "hosts", ["slurmd", "-D"]) for name in NODES]
        for command in commands:
            stack.enter_context(daemon(command, variables, folder))
            if command[0] == "munged":
                wait_until((munge / "socket").exists, "munged", log.read_text)
        idle = ("sinfo", "-h", "-t", "idle", "-o", "%D")
        wait_until(lambda: output_of(variables, *idle).strip() == "2", "both nodes", log.read_text)
        try:
            yield variables
        finally:  # jobs outlive the daemons
            output_of(variables, "scancel", "--user=root", "--signal=KILL", "--full")
            output_of(variables, "scancel", "--user=root")
            wait_until(lambda: not output_of(variables, "squeue", "-h").strip(), "the jobs' end", log.read_text)


def write_configuration(folder: Path, port: int) -> None:
    for name in ("munge", "state"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged requires that users can reach its socket
    (folder / "munge/key-file").write_bytes(os.urandom(1024))
    (folder / "munge/key-file").chmod(0o600)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{NODES[name]} {name}\n" for name in NODES))
    nodes = [NODE.format(name=name, address=NODES[name], port=port + 1 + at) for at, name in enumerate(NODES)]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, port=port) + "".join(nodes))
    (folder / "gpu0").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu0\n")


@contextmanager
def daemon(command: list[str], variables: Mapping[str, str], folder: Path) -> Iterator[None]:
    with (folder / "daemons.log").open("a") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def output_of(variables: Mapping[str, str], *command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables, cwd=cwd, timeout=60)
    return done.stdout + done.stderr


def wait_until(condition: Callable[[], bool], what: str, output: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}\n{output()}"
        time.sleep(0.1)
