"""The Slurm scripts, on a real cluster of two nodes if Slurm is installed, else with replaced programs."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.cluster.launch import CLUSTER, lint_errors, make_work_dir
from tests.cluster.slurm_cluster import missing, output_of, slurm_cluster, wait_until
from tests.conftest import cannot_run, contents
from tests.train.fault_injection import RESUME_FILE, Fault, marker_path
from tests.train.launch import fault_in_batch, read_events, read_losses, same_weights

from tinyllama.recipe import Recipe

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow

SCRIPTS = sorted(path for path in CLUSTER.rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_scripts_pass_shellcheck(script: Path) -> None:
    assert lint_errors(script.read_text()) == ""


PROGRAMS = Path(__file__).parent / "programs"
OF_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("ends_with", "state", "is_requeued"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (75, "RUNNING", True),
        (75, "CANCELLED", False),
    ],
)
def test_only_saved_uncancelled_run_is_requeued(tmp_path: Path, ends_with: int, state: str, is_requeued: bool) -> None:
    folder = make_work_dir(tmp_path / "work")
    (folder / ".venv").unlink()
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    found = os.environ | OF_A_JOB | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    found |= {"ENDS_WITH": str(ends_with), "STATE": state}
    command = ["bash", "cluster/slurm/train.sbatch", "mine.yaml", "--seed", "3"]
    done = subprocess.run(command, check=False, cwd=folder, env=found, capture_output=True, text=True)
    assert done.returncode == ends_with, done.stderr
    assert (folder / "requeued").exists() is is_requeued
    called = (folder / "srun.called").read_text().splitlines()
    torchrun = "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=a1:20007 --rdzv-id=7"
    torchrun += " --max-restarts=10 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=240"
    train = "cluster/rank.py train mine.yaml --seed 3"
    assert " ".join(called[called.index("python") :]) == f"python cluster/node.py {torchrun} {train}"


# A real cluster; `make check-clusters` runs these tests


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    if reason := missing():
        (cannot_run if os.geteuid() == 0 else pytest.skip)(reason)
    with slurm_cluster(free_ports(3)) as variables:
        yield variables


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    for first in range(17100, 20000, count):
        if all(is_free(first + at) for at in range(count)):
            return first
    raise AssertionError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as listening:
        return listening.connect_ex(("127.0.0.1", port)) != 0


class Job:
    """A submitted job: two ranks on two nodes, or one on one."""

    def __init__(self, slurm: dict[str, str], folder: Path, number: str) -> None:
        self.slurm, self.folder, self.number = slurm, folder, number

    def run(self, *command: str) -> str:
        return output_of(self.slurm, *command)

    def fields(self) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", self.number)))

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "logs").iterdir())) + str(self.fields())

    def wait_for_state(self, state: str) -> None:
        wait_until(lambda: self.fields().get("JobState") == state, state, self.output)

    def wait_for_fault(self, fault: Fault) -> None:
        wait_until((self.folder / marker_path(fault)).exists, str(fault)[:40], self.output)

    def wait_for_signal_on_both_ranks(self, signal: str) -> None:
        wait_until(lambda: self.output().count(f"closing signal {signal}") == 2, signal, self.output)
        (self.folder / RESUME_FILE).touch()


def submit(
    slurm: dict[str, str], folder: Path, small: Path, *flags: str, nodes: int = 2, faults: Sequence[Fault] = ()
) -> Job:
    options = ["--parsable", f"--nodes={nodes}", "--gpus-per-node=1", "--cpus-per-task=1"]
    command = ["sbatch", *options, "cluster/slurm/train.sbatch", str(small / "recipe.yaml"), *flags]
    variables = slurm | {"FAULTS": json.dumps(list(faults)), "OMP_NUM_THREADS": "1"}
    return Job(slurm, folder, output_of(variables, *command, cwd=folder).strip())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_work_dir(tmp_path / "work")


def waiting(small: Path) -> Fault:
    """Return a fault that makes rank 1 wait in step 14 until it may continue."""
    return fault_in_batch(Recipe.load(small / "recipe.yaml"), "wait", 13, 4)


@pytest.mark.cluster
def test_slurm_accepts_script(slurm: dict[str, str], folder: Path) -> None:
    output = output_of(slurm, "sbatch", "--test-only", "--gpus-per-node=1", "cluster/slurm/train.sbatch", cwd=folder)
    assert re.search(r"Job \d+ to start at .* using 128 processors on nodes node\[1-2\]", output), output


@pytest.mark.cluster
def test_slurm_store_equals_local_store(slurm: dict[str, str], folder: Path, small: Path) -> None:
    store = folder / "store"
    command = ["bash", "cluster/slurm/prepare.sh", str(small / "recipe.yaml"), "--data.store", str(store)]
    output = output_of(slurm | {"PARTITION": "all", "OMP_NUM_THREADS": "1"}, *command, cwd=folder)
    assert f"{store}: submitted to Slurm; its last job finishes the store" in output
    logs = folder / "store.slurm"
    wait_until(
        lambda: not output_of(slurm, "squeue", "-h").strip(),
        "the jobs' end",
        lambda: "".join(path.read_text() for path in logs.rglob("*.out")),
    )
    assert contents(store) == contents(small / "store")


@pytest.mark.cluster
def test_time_limit_signal_requeues_run_with_same_weights(
    slurm: dict[str, str], folder: Path, small: Path, reference_run_2_ranks: Path
) -> None:
    job = submit(slurm, folder, small, faults=[waiting(small)])
    job.wait_for_fault(waiting(small))
    job.run("scancel", "--signal=USR1", job.number)
    job.wait_for_signal_on_both_ranks("SIGUSR1")
    job.wait_for_state("COMPLETED")
    assert job.fields()["Restarts"] == "1"
    run = folder / "runs/small"
    (signal,) = read_events(run, "signal")
    assert [row["step"] for row in read_events(run, "start", "resume")] == [0, signal["step"]]
    assert read_losses(run) == read_losses(reference_run_2_ranks)
    assert same_weights(run, reference_run_2_ranks)


@pytest.mark.cluster
def test_lost_node_requeues_run(slurm: dict[str, str], folder: Path, small: Path, reference_run_2_ranks: Path) -> None:
    job = submit(slurm, folder, small, faults=[waiting(small)])
    job.wait_for_fault(waiting(small))
    job.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    wait_until(lambda: job.fields().get("Restarts") == "1", "being queued again", job.output)
    job.run("scontrol", "update", "nodename=node2", "state=resume")
    job.wait_for_state("COMPLETED")
    run = folder / "runs/small"
    assert [row["step"] for row in read_events(run, "start", "resume")] == [0, 10]
    assert read_losses(run) == read_losses(reference_run_2_ranks)
    assert same_weights(run, reference_run_2_ranks)


@pytest.mark.cluster
def test_saved_job_resumes_on_other_number_of_nodes(
    slurm: dict[str, str], folder: Path, small: Path, reference_run_2_ranks: Path
) -> None:
    job = submit(slurm, folder, small, faults=[waiting(small)])
    job.wait_for_fault(waiting(small))
    job.run("scontrol", "update", f"jobid={job.number}", "requeue=0")
    job.run("scancel", "--signal=USR1", job.number)
    job.wait_for_signal_on_both_ranks("SIGUSR1")
    job.wait_for_state("FAILED")
    assert (job.fields()["ExitCode"], job.fields()["Restarts"]) == ("75:0", "0")
    run = folder / "runs/small"
    (signal,) = read_events(run, "signal")
    alone = submit(slurm, folder, small, nodes=1)
    alone.wait_for_state("COMPLETED")
    resumes = [(row["step"], row["ranks"]) for row in read_events(run, "start", "resume")]
    assert resumes == [(0, 2), (signal["step"], 1)]
    found, expected = read_losses(run), read_losses(reference_run_2_ranks)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)


@pytest.mark.cluster
def test_cancelled_job_stays_cancelled(slurm: dict[str, str], folder: Path, small: Path) -> None:
    job = submit(slurm, folder, small, faults=[waiting(small)])
    job.wait_for_fault(waiting(small))
    job.run("scancel", job.number)
    wait_until(lambda: not output_of(slurm, "squeue", "-h").strip(), "its end", job.output)
    assert (job.fields()["JobState"], job.fields()["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.cluster
def test_wrong_input_is_reported_once_per_node(slurm: dict[str, str], folder: Path, small: Path) -> None:
    job = submit(slurm, folder, small, "--parallel.shard", "3")
    job.wait_for_state("FAILED")
    fields = job.fields()
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0")
    for node in range(2):
        output = (folder / f"logs/tinyllama-1.1b-{job.number}-node{node}.log").read_text()
        assert output.count("tinyllama: parallel: shard 3") <= 1, output
    assert "tinyllama: parallel: shard 3" in job.output()
