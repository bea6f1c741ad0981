"""On a disk without room each command that writes says so in one line, and nothing that it leaves looks whole."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import contents
from tests.engine_server import started_normally
from tests.faults.commands import Command, assert_one_line, enter_namespaces, run_command
from tests.faults.conftest import EVALUATE, RELEASE, RUN
from tests.train.launch import lacks_mount_namespaces, mount_small_disk

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def disk(gone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk with a copy of the whole way on it."""
    if lacks_mount_namespaces():
        pytest.skip("needs a mount namespace for a disk that is full")
    with mount_small_disk(tmp_path_factory.mktemp("mounts") / "disk", "40m") as place:
        shutil.copytree(gone, place / "way", symlinks=True)
        yield place / "way"


def fill(disk: Path) -> Path:
    """Leave nothing; return the file that takes the rest."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(free.f_bavail * free.f_frsize))
    return filler


COMMANDS: dict[str, Command] = {
    "tokenizer train": (("tokenizer", "train", "recipe.yaml", "--vocab-size", "600", "--tokenizer", "new"), "new/"),
    "tokenizer import": (("tokenizer", "import", "tokenizer", "imported"), "imported/"),
    "release": (("release", RUN, "--formats", "huggingface", "--force"), RELEASE),
    "evaluate": (EVALUATE, RELEASE / "evaluation.json"),
    "report": (("report", RUN), RUN / "report.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_what_was_there_stays(disk: Path, name: str) -> None:
    words, place = COMMANDS[name]
    # Seen from here it lies under /proc/NUMBER/root, which is no path that a program could resolve.
    there = enter_namespaces(int(disk.parts[2]), Path("/", *disk.parts[4:]))
    before = contents(disk / RUN)
    filler = fill(disk)
    try:
        with started_normally():  # the server of the engines does not see the disk
            full = run_command(disk, *words, fault=there)
    finally:
        filler.unlink()
    assert_one_line(full, place, "No space left on device")
    assert contents(disk / RUN) == before
    assert not list(disk.glob("*/tokenizer.json"))[1:], "another than the tokenizer that was there"
    with started_normally():
        again = run_command(disk, *words, fault=there)
    assert again.status == 0, again.said
    for made in ("new", "imported"):
        shutil.rmtree(disk / made, ignore_errors=True)
