"""Where a folder may not be written or a file not be read, a command says so in one line that names it."""

from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import Command, assert_one_line, drop_privileges, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN, skip_peak

GOES_ON_LATER = {"checkpoint"}
"""Where a run that is under way cannot go on: status 1; everything else is input that is wrong, status 2."""

OUTPUTS: dict[str, Command] = {
    "tokenizer train": (
        ("tokenizer", "train", "recipe.yaml", "--vocab-size", "600", "--tokenizer", "shut/new"),
        "shut",
    ),
    "tokenizer import": (("tokenizer", "import", "tokenizer", "shut/new"), "shut"),
    "prepare": (("prepare", "recipe.yaml", "--data.store", "shut/store"), "shut"),
    "train": (("train", "recipe.yaml", "--name", "fresh"), "runs"),
    "checkpoint": (("train", "recipe.yaml", "--train.tokens", str(20 * 6 * 64), "--allow-change"), RUN / "checkpoints"),
    "release": (("release", RUN, "--formats", "huggingface", "--force"), RUN / "releases"),
    "evaluate": (EVALUATE, RELEASE),
    "report": (("report", RUN), RUN),
    "watch": (("watch", RUN, "--no-open-browser"), "runs"),
}


def shut_off() -> None:
    skip_peak()
    drop_privileges()


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_folder_that_may_not_be_written_is_one_line_that_names_it(way: Path, name: str) -> None:
    words, folder = OUTPUTS[name]
    (way / folder).mkdir(exist_ok=True)
    before = contents(way / folder)
    (way / folder).chmod(0o555)
    ended = run_command(way, *words, fault=shut_off)
    assert_one_line(ended, folder, "ermission", status=(1,) if name in GOES_ON_LATER else (2,))
    assert {path: data for path, data in contents(way / folder).items() if path in before} == before


STORE = "store/modules/train/00000.tokens"
INPUTS: dict[str, Command] = {
    "prepare": (("prepare", "recipe.yaml", "--data.store", "other"), "raw/modules/a.jsonl"),
    "inspect": (("inspect", "store", "--verify"), STORE),
    "train": (("train", "recipe.yaml", "--name", "fresh"), STORE),
    "checkpoint": (("release", RUN, "--force"), RUN / "checkpoints/step-00000012/__0_0.distcp"),
    "verify": (("verify", RELEASE), RELEASE / "huggingface/model.safetensors"),
    "generate": (("generate", RELEASE, "import"), RELEASE / "huggingface/model.safetensors"),
    "evaluate": (EVALUATE, RELEASE / "huggingface/model.safetensors"),
    "report": (("report", RUN), RUN / "metrics.jsonl"),
    "push": (("release", RELEASE, "--push", "ada/small"), RELEASE / "huggingface/model.safetensors"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_file_that_may_not_be_read_is_one_line_that_names_it(way: Path, name: str) -> None:
    words, file = INPUTS[name]
    (way / file).chmod(0)
    ended = run_command(way, *words, fault=shut_off)
    assert_one_line(ended, file, "ermission", status=(2,))
