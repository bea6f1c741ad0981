"""Two hosts with a network, from which one is disconnected for a while."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.cluster.launch import CLUSTER, make_work_dir, started, torchrun_options, with_host_name
from tests.cluster.slurm_cluster import wait_until
from tests.conftest import cannot_run
from tests.train.fault_injection import RESUME_FILE, marker_path
from tests.train.launch import LIMIT_SECONDS, fault_in_batch, read_events, read_losses, same_weights

from tinyllama.recipe import Recipe

pytest_plugins = ["tests.train.fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.cluster]  # `make check-clusters` runs it


class Hosts:
    """Two network namespaces that are connected only to each other and share a file system."""

    addresses = ("10.77.31.1", "10.77.31.2")

    def __init__(self, names_file: Path) -> None:
        self.names = [f"host-{uuid.uuid4().hex[:8]}" for _ in self.addresses]
        self.names_file = names_file

    def connect(self) -> None:
        first, second = self.names
        known = zip(self.addresses, self.names, strict=True)
        self.names_file.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in known))
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")

    def on(self, name: str, command: list[str]) -> list[str]:
        """Return a command that runs on a host."""
        return ["ip", "netns", "exec", name, *with_host_name(name, self.names_file, command)]

    def cut(self, state: str) -> None:
        """Disconnect (`down`) or connect (`up`) the second host."""
        ip("-n", self.names[1], "link", "set", "cable", state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if shutil.which("ip") is None:
        cannot_run("needs iproute2")
    both = Hosts(tmp_path / "hosts")
    try:
        both.connect()
        yield both
    finally:
        both.remove()


def test_disconnected_host_changes_no_weights(
    small: Path, tmp_path: Path, hosts: Hosts, reference_run_2_ranks: Path
) -> None:
    folder, wait = make_work_dir(tmp_path / "work"), fault_in_batch(Recipe.load(small / "recipe.yaml"), "wait", 13, 4)
    of_a_job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "nodes": "\n".join(hosts.names)}
    options = torchrun_options((CLUSTER / "slurm/train.sbatch").read_text(), of_a_job)
    train = ["cluster/rank.py", "train", str(small / "recipe.yaml"), "--guard.watchdog_seconds", "6"]
    launch = [sys.executable, "cluster/node.py", *options, *train]
    logs = [folder / f"logs/{name}" for name in hosts.names]
    with ExitStack() as stack:
        launchers = [
            stack.enter_context(started(hosts.on(name, launch), folder, log, FAULTS=json.dumps([wait])))
            for name, log in zip(hosts.names, logs, strict=True)
        ]

        def output() -> str:
            return "\n".join(log.read_text() for log in logs)

        run = folder / "runs/small"
        wait_until((folder / marker_path(wait)).exists, "step 14", output)
        hosts.cut("down")
        (folder / RESUME_FILE).touch()
        wait_until(lambda: len(read_events(run, "hang")) == 2, "both ranks' watchdogs", output)
        hosts.cut("up")
        for launcher in launchers:
            assert launcher.wait(LIMIT_SECONDS) == 0, output()
    assert {row["rank"] for row in read_events(run, "hang")} == {0, 1}
    assert [row["step"] for row in read_events(run, "start", "resume")] == [0, 10]
    assert read_losses(run) == read_losses(reference_run_2_ranks)
    assert same_weights(run, reference_run_2_ranks)
