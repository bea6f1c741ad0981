"""A command that may not write a folder or read a file prints a one-line error that names the folder or file."""

from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import Command, assert_one_line, drop_privileges, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN, skip_peak

STOPS_A_RUN = {"checkpoint"}
"""Cases in which a run that has begun stops, status 1; all others are wrong input, status 2."""

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
}


def restrict() -> None:
    skip_peak()
    drop_privileges()


@pytest.mark.parametrize("name", OUTPUTS)
def test_unwritable_folder_is_named(pipeline: Path, name: str) -> None:
    command, folder = OUTPUTS[name]
    (pipeline / folder).mkdir(exist_ok=True)
    before = contents(pipeline / folder)
    (pipeline / folder).chmod(0o555)
    result = run_command(pipeline, *command, fault=restrict)
    assert_one_line(result, folder, "ermission", status=(1,) if name in STOPS_A_RUN else (2,))
    assert {path: data for path, data in contents(pipeline / folder).items() if path in before} == before


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
def test_unreadable_file_is_named(pipeline: Path, name: str) -> None:
    command, file = INPUTS[name]
    (pipeline / file).chmod(0)
    assert_one_line(run_command(pipeline, *command, fault=restrict), file, "ermission")
