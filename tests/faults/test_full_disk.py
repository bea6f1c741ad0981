"""On a full disk, each command that writes prints a one-line error and leaves no incomplete result."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import contents
from tests.faults.commands import Command, assert_one_line, assert_succeeds, enter_namespaces, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN
from tests.fork_server import started_normally
from tests.train.launch import mount_small_disk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def disk(completed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk with a copy of the completed pipeline."""
    with mount_small_disk(tmp_path_factory.mktemp("mounts") / "disk", "40m") as place:
        shutil.copytree(completed, place / "pipeline", symlinks=True)
        yield place / "pipeline"


def fill(disk: Path) -> Path:
    """Fill the disk completely; return the file that takes the space."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize))
    return filler


COMMANDS: dict[str, Command] = {
    "tokenizer train": (("tokenizer", "train", "recipe.yaml", "--vocab-size", "600", "--tokenizer", "new"), "new/"),
    "tokenizer import": (("tokenizer", "import", "tokenizer", "imported"), "imported/"),
    "prepare": (("prepare", "recipe.yaml", "--data.store", "store-new"), "store-new"),
    "release": (("release", RUN, "--formats", "huggingface", "--force"), RELEASE),
    "evaluate": (EVALUATE, RELEASE / "evaluation.json"),
    "report": (("report", RUN), RUN / "report.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk_is_reported_and_keeps_existing_files(disk: Path, name: str) -> None:
    command, place = COMMANDS[name]
    # From here the disk is below /proc/NUMBER/root, a path that programs cannot resolve.
    on_disk = enter_namespaces(int(disk.parts[2]), Path("/", *disk.parts[4:]))
    before = contents(disk / RUN)
    filler = fill(disk)
    try:
        with started_normally():  # the server of the engines does not see the disk
            result = run_command(disk, *command, fault=on_disk)
    finally:
        filler.unlink()
    assert_one_line(result, place, "No space left on device")
    assert contents(disk / RUN) == before
    assert [path.parent.name for path in disk.glob("*/tokenizer.json")] == ["tokenizer"]
    with started_normally():
        assert_succeeds(disk, *command, fault=on_disk)
    assert name != "prepare" or contents(disk / "store-new") == contents(disk / "store")
    for made in ("new", "imported", "store-new"):
        shutil.rmtree(disk / made, ignore_errors=True)
