"""Killed while they write, commands leave nothing that looks whole, and done again give the same."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import Fault, kill_at_write, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN

from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.release.verify import file_checks
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGTERM])
TOKENIZER = ("tokenizer", "train", "recipe.yaml", "--vocab-size", "600")
FORCED = ("release", RUN, "--formats", "huggingface", "--force")


@BOTH
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "command", [TOKENIZER, ("tokenizer", "import", "source", "tokenizer")], ids=["train", "import"]
)
def test_a_tokenizer_killed_while_it_is_written_is_none_and_again_is_the_same(
    way: Path, command: tuple[str, ...], file: str, what: signal.Signals
) -> None:
    (way / "tokenizer").rename(way / "source")
    died = run_command(way, *command, fault=kill_at_write(f"tokenizer/{file}", what))
    assert died.status == -what, died.said
    assert any((way / "tokenizer").iterdir())
    assert not (way / "tokenizer/tokenizer.json").exists()  # written last: without it there is no tokenizer
    if file == "tokenizer.model":
        with pytest.raises(InputError, match=r"no tokenizer.json and no tokenizer.model in this folder"):
            Tokenizer.load(way / "tokenizer")
    else:  # its tokenizer.model is whole, and says the same
        assert Tokenizer.load(way / "tokenizer").digest == Tokenizer.load(way / "source").digest
    again = run_command(way, *command)
    assert again.status == 0, again.said
    assert contents(way / "tokenizer").keys() == contents(way / "source").keys()
    if command is TOKENIZER:
        assert contents(way / "tokenizer") == contents(way / "source")


def test_killed_while_it_replaces_another_tokenizer_the_folder_holds_no_mix_of_both(way: Path) -> None:
    assert (
        run_command(way, "tokenizer", "train", "recipe.yaml", "--vocab-size", "500", "--tokenizer", "another").status
        == 0
    )
    died = run_command(way, "tokenizer", "import", "another", "tokenizer", fault=kill_at_write("tokenizer.model"))
    assert died.status == -signal.SIGKILL
    assert not (way / "tokenizer/tokenizer.json").exists()


@pytest.mark.parametrize(("file", "what"), [("model.safetensors", signal.SIGKILL), ("release.json", signal.SIGTERM)])
def test_a_release_killed_while_it_is_written_is_none_and_again_is_the_same(
    way: Path, file: str, what: signal.Signals
) -> None:
    before = contents(way / RELEASE)
    shutil.rmtree(way / RELEASE)
    died = run_command(way, *FORCED, fault=kill_at_write(file, what))
    assert died.status == -what, died.said
    assert not (way / RELEASE).exists()
    again = run_command(way, *FORCED)
    assert again.status == 0, again.said
    unscored = {name for name in before if name != "evaluation.json"}
    assert {name: data for name, data in contents(way / RELEASE).items() if name in SAME} == {
        name: before[name] for name in SAME
    }
    assert contents(way / RELEASE).keys() == unscored
    assert [path.name for path in (way / RUN / "releases").iterdir() if path.name.startswith(".")] == []


SAME = ("huggingface/model.safetensors", "huggingface/tokenizer.json", "huggingface/config.json")
"""Files of a release without its scores, which a card has."""


def dies_after_renaming(part: str) -> Fault:
    def plant() -> None:
        rename = Path.rename

        def planted(self: Path, target: Path) -> Path:
            renamed = rename(self, target)
            if self.name == part:
                os.kill(os.getpid(), signal.SIGKILL)
            return renamed

        Path.rename = planted  # type: ignore[method-assign, assignment]

    return plant


def test_killed_while_it_replaces_a_release_one_of_the_two_is_there_at_the_next_start(way: Path) -> None:
    before = contents(way / RELEASE)
    died = run_command(way, *FORCED, fault=dies_after_renaming(RELEASE.name))
    assert died.status == -signal.SIGKILL
    again = run_command(way, *FORCED, fault=kill_at_write("model.safetensors"))
    assert again.status == -signal.SIGKILL
    assert contents(way / RELEASE) == before, "neither the old release nor a new one"


@BOTH
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (EVALUATE, RELEASE / "evaluation.json"),
        (EVALUATE, RELEASE / "release.json"),
        (("report", RUN), RUN / "report.html"),
    ],
    ids=["scores", "card", "report"],
)
def test_killed_while_it_writes_a_file_the_one_before_stays_and_again_is_whole(
    way: Path, command: tuple[object, ...], file: Path, what: signal.Signals
) -> None:
    before = (way / file).read_bytes()
    died = run_command(way, *command, fault=kill_at_write(str(file), what))
    assert died.status == -what, died.said
    assert (way / file).read_bytes() == before
    again = run_command(way, *command)
    assert again.status == 0, again.said
    assert not list((way / RUN).rglob("*.part"))
    facts = read_json(way / RELEASE / "release.json")
    assert [check for check in file_checks(way / RELEASE, facts["files"]) if not check.passed] == []
