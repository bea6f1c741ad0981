"""The Kubernetes manifest against the operator's API models, and the commands of its pods."""

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.launch import CLUSTER, free_port, make_work_dir, started
from tests.cluster.slurm_cluster import wait_until
from tests.train.fault_injection import RESUME_FILE, marker_path
from tests.train.launch import LIMIT_SECONDS, fault_in_batch, read_events, read_losses, same_weights

from tinyllama.recipe import Recipe

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow


def documents() -> dict[str, Any]:
    """Return the documents of the manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((CLUSTER / "kubernetes/train.yaml").open())}


class Response:
    """A response as the client's deserializer expects it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.data = json.dumps(document)


@pytest.mark.parametrize(
    ("kind", "model"), [("PyTorchJob", "KubeflowOrgV1PyTorchJob"), ("PersistentVolumeClaim", "V1PersistentVolumeClaim")]
)
def test_manifest_fields_exist_in_api(kind: str, model: str) -> None:
    client = pytest.importorskip("kubeflow.training").ApiClient()
    written = documents()[kind]
    # Fields that the operator's models lack are lost in the round trip.
    assert client.sanitize_for_serialization(client.deserialize(Response(written), model)) == written


def worker() -> dict[str, Any]:
    replicas: dict[str, Any] = documents()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]
    return replicas


def test_pod_has_grace_period_and_gpu_per_rank() -> None:
    spec, policy = worker()["template"]["spec"], documents()["PyTorchJob"]["spec"]["elasticPolicy"]
    (container,) = spec["containers"]
    assert container["name"] == "pytorch"  # the operator sets its variables only in this container
    (timeout,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--shutdown-timeout")]
    assert int(timeout) + 30 < spec["terminationGracePeriodSeconds"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(policy["nProcPerNode"])
    assert policy["minReplicas"] == policy["maxReplicas"] == worker()["replicas"]


def operator_variables(port: int) -> dict[str, str]:
    """What the training operator makes of an elastic policy, for pods of one rank."""
    policy = documents()["PyTorchJob"]["spec"]["elasticPolicy"]
    return {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_NPROC_PER_NODE": "1",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }


def pods(stack: ExitStack, folder: Path, recipe: Path, *flags: str, **variables: str) -> list[Any]:
    """The two workers' commands as processes, with the variables that the file and the operator give them."""
    (container,) = worker()["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    given |= operator_variables(free_port()) | variables | {"OMP_NUM_THREADS": "1"}
    arguments = [str(recipe) if word == "tinyllama-1.1b" else word for word in container["args"]]
    command = [sys.executable, *container["command"][1:], *arguments, *flags]
    logs = [folder / f"logs/{number}" for number in range(2)]
    return [stack.enter_context(started(command, folder, log, **given)) for log in logs]


def output(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "logs").iterdir()))


@pytest.mark.cluster  # `make check-clusters` runs it
def test_drained_pod_saves_and_resumes_with_same_weights(
    small: Path, tmp_path: Path, reference_run_2_ranks: Path
) -> None:
    folder, wait = make_work_dir(tmp_path / "work"), fault_in_batch(Recipe.load(small / "recipe.yaml"), "wait", 13, 4)
    assert worker()["restartPolicy"] == "ExitCode"  # which asks for a status of 128 or more
    with ExitStack() as stack:
        both = pods(stack, folder, small / "recipe.yaml", FAULTS=json.dumps([wait]))
        wait_until((folder / marker_path(wait)).exists, "step 14", lambda: output(folder))
        os.kill(both[0].pid, signal.SIGTERM)
        wait_until(lambda: "closing signal SIGTERM" in output(folder), "the signal", lambda: output(folder))
        (folder / RESUME_FILE).touch()
        assert [pod.wait(LIMIT_SECONDS) for pod in both] == [203, 203], output(folder)
    with ExitStack() as stack:
        both = pods(stack, folder, small / "recipe.yaml")
        assert [pod.wait(LIMIT_SECONDS) for pod in both] == [0, 0], output(folder)
    run = folder / "runs/small"
    (saved,) = read_events(run, "signal")
    assert [row["step"] for row in read_events(run, "start", "resume")] == [0, saved["step"]]
    assert read_losses(run) == read_losses(reference_run_2_ranks)
    assert same_weights(run, reference_run_2_ranks)


def test_wrong_input_ends_every_pod(small: Path, tmp_path: Path) -> None:
    folder = make_work_dir(tmp_path / "work")
    with ExitStack() as stack:
        both = pods(stack, folder, small / "recipe.yaml", "--parallel.shard", "3")
        assert [pod.wait(LIMIT_SECONDS) for pod in both] == [2, 2], output(folder)
    for pod in range(2):
        assert (folder / f"logs/{pod}").read_text().count("tinyllama: parallel: shard 3") == 1
