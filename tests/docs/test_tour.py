"""docs/tour.md, which `tools/tour.py` records: its commands, its pictures, and how long output is shortened."""

import re
import shlex
from pathlib import Path

import pytest
from matplotlib.image import imread
from tests.docs.blocks import ROOT, blocks_of
from tools import tour

from tinyllama import cli


def test_recorded_commands_are_still_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(tour.PAGE)
    assert {block.language for block in blocks} == {"console", "pycon"}
    consoles = [block.body.partition("\n") for block in blocks if block.language == "console"]
    commands = [line.removeprefix("$ ") for line, _, _ in consoles]
    recipe = next(output for line, _, output in consoles if line.startswith("$ cat "))
    (tmp_path / f"{tour.FOLDER}.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    for program, *words in map(shlex.split, commands):
        if program == "tinyllama" and "--help" not in words:
            cli.parse_command(words)
    helps = {command.split()[1] for command in commands if command.endswith(" --help")}
    assert helps == {"init", "run", "generate"}


def test_pictures_are_small_and_have_the_stated_widths() -> None:
    named = set(re.findall(r"\]\((assets/live-[\w-]+\.png)\)", tour.PAGE.read_text()))
    pictures = sorted(tour.PICTURES.glob("live-*.png"))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in pictures}
    assert len(pictures) == len(tour.MOMENTS) * len(tour.SIZES)
    for path in pictures:
        assert path.stat().st_size < 150_000, path.name
        height, width, _ = imread(path).shape
        assert (width, height) == tour.SIZES[path.stem.rpartition("-")[2]]


def test_long_output_is_shortened_with_the_number_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n".join([f"{tmp_path}/runs", "```", *map(str, range(2, 200))])
    fence, *lines, last, end = tour.block("console", text).split("\n")
    assert (fence, last, end) == ("````console", "````", "")
    assert len(lines) == tour.MAX_LINES + 1
    assert (lines[0], lines[-tour.LAST_LINES - 1], lines[-1]) == ("runs", "… (40 lines)", "199")


def test_session_shows_values_as_the_interpreter_does() -> None:
    assert tour.python_session(["a = 1", "a, 'b'"]) == ">>> a = 1\n>>> a, 'b'\n(1, 'b')\n"
