"""Training in an environment that contains only the requirements of `tinyllama.train`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.distributions import create_environment, with_requirements
from tests.train.launch import LIMIT_SECONDS, event_steps, load_weights, read_losses

from tinyllama.runs.run_dir import RunDir

pytest_plugins = ["tests.train.fixtures"]

NEEDED = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "tokenizers")
NOT_NEEDED = ("huggingface-hub",)
"""Requirements of the above that only downloads use."""
ABSENT = {
    *("pyarrow", "datatrove", "trackio", "matplotlib", "lm_eval", "rich", "orjson", "tyro", "sentencepiece"),
    *("huggingface_hub", "httpx"),
}
PROGRAM = str(Path(__file__).with_name("minimal_program.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the needed packages only."""
    return create_environment(tmp_path_factory.mktemp("minimal") / "venv", with_requirements(NEEDED, NOT_NEEDED))


def start(python: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [python, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_run_resumes_on_two_ranks(python: Path, small: Path, tmp_path: Path, reference_run: Path) -> None:
    run, recipe = RunDir(tmp_path / "runs/small"), str(small / "recipe.yaml")
    with start(python, tmp_path, PROGRAM, recipe) as training:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not run.checkpoints():
            assert training.poll() is None, training.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        training.send_signal(signal.SIGKILL)
    with start(python, tmp_path, *TORCHRUN, PROGRAM, recipe) as training:
        output = training.communicate(timeout=LIMIT_SECONDS)[0]
    assert training.returncode == 0, output
    assert "imported:" in output
    assert {*output.partition("imported:")[2].split()} & ABSENT == set()
    (resumed,) = event_steps(run.path, "resume")
    losses, reference = read_losses(run.path), read_losses(reference_run)
    assert losses[:resumed] == reference[:resumed]
    assert [step for step, _ in losses] == [step for step, _ in reference]
    assert losses[-1][1] == pytest.approx(reference[-1][1], rel=1e-4)
    assert load_weights(run.path).keys() == load_weights(reference_run).keys()
    assert (run.tokenizer_dir / "tokenizer.model").read_bytes() == (small / "tokenizer/tokenizer.model").read_bytes()


def test_command_line_names_the_missing_package(python: Path, small: Path, tmp_path: Path) -> None:
    with start(python, tmp_path, "-m", "tinyllama", "train", str(small / "recipe.yaml")) as command:
        output = command.communicate(timeout=LIMIT_SECONDS)[0]
    assert command.returncode == 2
    assert output.startswith("tinyllama: command line: tyro")
    assert "train_model" in output
    assert output.count("\n") == 1
