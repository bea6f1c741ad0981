"""A file that was cut, or of which a bit flipped, is refused in one line with its name, whichever command reads it."""

from pathlib import Path

import pytest
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_file_is_one_line_that_names_it(way: Path, name: str) -> None:
    words, file = READERS[name]
    cut(way / file)
    assert_one_line(run_command(way, *words, fault=skip_peak), Path(file).parent, Path(file).name)


@pytest.mark.parametrize("name", ["run", "release", "push"])
def test_a_flipped_bit_is_one_line_that_names_the_file(way: Path, name: str) -> None:
    words, file = READERS[name]
    flip(way / file)
    assert_one_line(run_command(way, *words), file)


def test_verify_names_the_damaged_file_of_a_release(way: Path) -> None:
    flip(way / WEIGHTS)
    ended = run_command(way, "verify", RELEASE)
    assert ended.status == 1, ended.said
    assert any(line.startswith("huggingface/model.safetensors ") and "FAIL" in line for line in ended.said.splitlines())


def test_a_tokenizer_whose_bit_flipped_is_refused_by_what_was_made_with_it(way: Path) -> None:
    flip(way / "tokenizer/tokenizer.json")
    (way / "tokenizer/tokenizer.model").unlink()
    assert_one_line(run_command(way, "train", "recipe.yaml", "--name", "fresh", fault=skip_peak), "tokenizer")
