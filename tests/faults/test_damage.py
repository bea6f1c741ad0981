"""Every command refuses a truncated or corrupted file and names the file."""

from pathlib import Path

import pytest
from tests.conftest import flip_a_bit
from tests.faults.commands import Command, assert_one_line, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN, skip_peak

pytestmark = pytest.mark.slow

CHECKPOINT = RUN / "checkpoints/step-00000012/__0_0.distcp"
WEIGHTS = RELEASE / "huggingface/model.safetensors"
READERS: dict[str, Command] = {
    "tokenizer import": (("tokenizer", "import", "tokenizer/tokenizer.model", "other"), "tokenizer/tokenizer.model"),
    "prepare": (("prepare", "recipe.yaml", "--data.store", "other"), "tokenizer/tokenizer.json"),
    "train": (("train", "recipe.yaml", "--name", "fresh"), "store/modules/train/00000.tokens"),
    "run": (("generate", RUN, "import"), CHECKPOINT),
    "release": (("release", RUN, "--force"), CHECKPOINT),
    "generate": (("generate", RELEASE, "import"), WEIGHTS),
    "evaluate": (EVALUATE, WEIGHTS),
    "report": (("report", RUN), RUN / "store.json"),
    "push": (("release", RELEASE, "--push", "ada/small"), WEIGHTS),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", READERS)
def test_truncated_file_is_named(pipeline: Path, name: str) -> None:
    command, file = READERS[name]
    truncate(pipeline / file)
    assert_one_line(run_command(pipeline, *command, fault=skip_peak), Path(file).parent, Path(file).name)


@pytest.mark.parametrize("name", ["run", "release", "push"])
def test_file_with_a_flipped_bit_is_named(pipeline: Path, name: str) -> None:
    command, file = READERS[name]
    flip_a_bit(pipeline / file)
    assert_one_line(run_command(pipeline, *command), file)


def test_verify_names_the_damaged_file_of_a_release(pipeline: Path) -> None:
    flip_a_bit(pipeline / WEIGHTS)
    result = run_command(pipeline, "verify", RELEASE)
    assert result.status == 1, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("huggingface/model.safetensors ") and "FAIL" in line for line in lines)


def test_tokenizer_with_a_flipped_bit_is_refused_by_training(pipeline: Path) -> None:
    flip_a_bit(pipeline / "tokenizer/tokenizer.json")
    (pipeline / "tokenizer/tokenizer.model").unlink()
    result = run_command(pipeline, "train", "recipe.yaml", "--name", "fresh", fault=skip_peak)
    assert_one_line(result, "tokenizer")
