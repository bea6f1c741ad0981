"""A command that is killed while it writes leaves no incomplete result; the next run writes the same files."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import assert_one_line, assert_succeeds, kill_at_write, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN

from tinyllama.errors import INTERRUPTED_STATUS, InputError
from tinyllama.files import read_json
from tinyllama.release.verify import verify_files
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

KILL_OR_TERM = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
TRAIN_TOKENIZER = ("tokenizer", "train", "recipe.yaml", "--vocab-size", "600")
REPLACE_RELEASE = ("release", RUN, "--formats", "huggingface", "--force")
FILES_WITHOUT_SCORES = (
    "huggingface/model.safetensors",
    "huggingface/tokenizer.json",
    "huggingface/config.json",
)
"""Files of a release that do not depend on its scores, as the card does."""


@KILL_OR_TERM
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "command", [TRAIN_TOKENIZER, ("tokenizer", "import", "source", "tokenizer")], ids=["train", "import"]
)
def test_partly_written_tokenizer_does_not_load_and_is_rewritten_identically(
    pipeline: Path, command: tuple[str, ...], file: str, number: signal.Signals
) -> None:
    (pipeline / "tokenizer").rename(pipeline / "source")
    killed = run_command(pipeline, *command, fault=kill_at_write(f"tokenizer/{file}", number))
    assert killed.status == -number, killed.output
    assert any((pipeline / "tokenizer").iterdir())
    assert not (pipeline / "tokenizer/tokenizer.json").exists()  # written last
    if file == "tokenizer.model":
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            Tokenizer.load(pipeline / "tokenizer")
    else:  # tokenizer.model is complete and equivalent
        assert Tokenizer.load(pipeline / "tokenizer").digest == Tokenizer.load(pipeline / "source").digest
    assert_succeeds(pipeline, *command)
    assert contents(pipeline / "tokenizer").keys() == contents(pipeline / "source").keys()
    if command is TRAIN_TOKENIZER:
        assert contents(pipeline / "tokenizer") == contents(pipeline / "source")


def test_kill_during_the_replacement_of_a_tokenizer_never_leaves_files_of_two_tokenizers(pipeline: Path) -> None:
    train = ("tokenizer", "train", "recipe.yaml", "--vocab-size", "500", "--tokenizer", "another")
    assert_succeeds(pipeline, *train)
    killed = run_command(
        pipeline, "tokenizer", "import", "another", "tokenizer", fault=kill_at_write("tokenizer.model")
    )
    assert killed.status == -signal.SIGKILL
    assert not (pipeline / "tokenizer/tokenizer.json").exists()


@pytest.mark.parametrize(("file", "number"), [("model.safetensors", signal.SIGKILL), ("release.json", signal.SIGTERM)])
def test_partly_written_release_does_not_exist_and_is_rewritten_identically(
    pipeline: Path, file: str, number: signal.Signals
) -> None:
    before = contents(pipeline / RELEASE)
    shutil.rmtree(pipeline / RELEASE)
    killed = run_command(pipeline, *REPLACE_RELEASE, fault=kill_at_write(file, number))
    assert killed.status == -number, killed.output
    assert not (pipeline / RELEASE).exists()
    assert_succeeds(pipeline, *REPLACE_RELEASE)
    after = contents(pipeline / RELEASE)
    assert {name: after[name] for name in FILES_WITHOUT_SCORES} == {name: before[name] for name in FILES_WITHOUT_SCORES}
    assert after.keys() == {name for name in before if name != "evaluation.json"}
    assert not [path.name for path in (pipeline / RUN / "releases").iterdir() if path.name.startswith(".")]


def kill_after_renaming() -> None:
    """Kill the process after it has moved the old release away, before the new one takes its place."""
    rename = Path.rename

    def faulty_rename(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if self.name == RELEASE.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    Path.rename = faulty_rename  # type: ignore[method-assign, assignment]


def test_kill_during_the_replacement_of_a_release_leaves_the_old_or_the_new_one(pipeline: Path) -> None:
    before = contents(pipeline / RELEASE)
    killed = run_command(pipeline, *REPLACE_RELEASE, fault=kill_after_renaming)
    assert killed.status == -signal.SIGKILL
    killed_again = run_command(pipeline, *REPLACE_RELEASE, fault=kill_at_write("model.safetensors"))
    assert killed_again.status == -signal.SIGKILL
    assert contents(pipeline / RELEASE) == before


@KILL_OR_TERM
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (EVALUATE, RELEASE / "evaluation.json"),
        (EVALUATE, RELEASE / "release.json"),
        (("report", RUN), RUN / "report.html"),
    ],
    ids=["scores", "card", "report"],
)
def test_kill_while_a_file_is_written_keeps_the_previous_one(
    pipeline: Path, command: tuple[object, ...], file: Path, number: signal.Signals
) -> None:
    before = (pipeline / file).read_bytes()
    killed = run_command(pipeline, *command, fault=kill_at_write(str(file), number))
    assert killed.status == -number, killed.output
    assert (pipeline / file).read_bytes() == before
    assert_succeeds(pipeline, *command)
    assert not list((pipeline / RUN).rglob("*.part"))
    files = read_json(pipeline / RELEASE / "release.json")["files"]
    assert all(check.passed for check in verify_files(pipeline / RELEASE, files))


@pytest.mark.parametrize(
    ("command", "file", "remedy"),
    [
        ((*TRAIN_TOKENIZER, "--tokenizer", "other"), "tokenizer.json", "nothing was saved"),
        (("prepare", "recipe.yaml", "--data.store", "other"), "00000.tokens", "unfinished files"),
        (REPLACE_RELEASE, "model.safetensors", "unfinished release"),
        (EVALUATE, "evaluation.json", "nothing was saved"),
    ],
    ids=["tokenizer", "prepare", "release", "evaluate"],
)
def test_ctrl_c_prints_one_line_with_the_effect_of_a_rerun(
    pipeline: Path, command: tuple[object, ...], file: str, remedy: str
) -> None:
    interrupted = run_command(pipeline, *command, fault=kill_at_write(file, signal.SIGINT))
    assert_one_line(interrupted, "rerun the same command", remedy, status=(INTERRUPTED_STATUS,))
