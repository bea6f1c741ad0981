"""Completion in real shells: commands, options, fields of the recipe, values and files."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster.launch import lint_errors
from tests.conftest import cannot_run

from tinyllama import cli
from tinyllama.recipe import Source
from tinyllama.recipe.loading import field_infos

SHELLS = ("bash", "zsh", "fish")
CASES = {
    "tinyllama tr": {"train"},
    "tinyllama tok": {"tokenizer"},
    "tinyllama tokenizer ": {"train", "import"},
    "tinyllama completion ": {*SHELLS},
    "tinyllama generate --t": {"--temperature", "--top-k", "--top-p"},
    "tinyllama train demo --train.prec": {"--train.precision"},
    "tinyllama train demo --train.precision ": {"bf16", "fp16", "fp32"},
    "tinyllama train demo --train.compile ": {"true", "false"},
    "tinyllama evaluate runs/mine --precision ": {"bf16", "fp16", "fp32"},
    "tinyllama tokenizer train demo --model.tie": {"--model.tie_embeddings"},
    "tinyllama train demo --data.sources.starcoderdata.w": {"--data.sources.starcoderdata.weight"},
    "tinyllama tokenizer train dark.yaml --data.sources.b": {
        f"--data.sources.books.{field}" for field, _ in field_infos(Source)
    },
    "tinyllama plan dark.yaml --data.sources.second.clean.lang": {
        "--data.sources.second.clean.language",
        "--data.sources.second.clean.languages",
    },
    "tinyllama plan dark.yaml --data.sources.second.holdout ": {"tail"},
    "tinyllama watch --no": {"--no-browser"},
    "tinyllama train d": {"demo", "demo-long", "dark.yaml"},
    "tinyllama plan demo --al": set(),
    "tinyllama train demo --al": {"--allow-change"},
}
"""Command lines, and the completions of their last word. In the folder are `dark.yaml` and `drop.txt`."""
RECIPE = """\
data:
  # the sources
  sources:  # two of them
    books:
      format: text
      weight: 1

    "second": {format: jsonl, weight: 2}
    b$(touch expanded): {format: jsonl, weight: 1}
  stages:
    - weights: {books: 1}
train:
  sources:
    other: 1
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the three scripts, as the command prints them."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        command = [sys.executable, "-m", "tinyllama", "completion", shell]
        (folder / shell).write_bytes(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dark.yaml").write_text(RECIPE)
    (tmp_path / "drop.txt").touch()
    return tmp_path


def find_shell(name: str) -> str:
    if path := shutil.which(name):
        return path
    cannot_run(f"{name} is missing; install it: apt-get install {name}")


def complete_in_bash(script: Path, line: str, folder: Path) -> set[str]:
    command = ["bash", str(Path(__file__).with_name("complete.bash")), str(script), *line.split(" ")]
    done = subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True, timeout=30)
    assert not done.stderr
    return {*done.stdout.split()}


def complete_in_fish(script: Path, line: str, folder: Path) -> set[str]:
    command = [find_shell("fish"), "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(script), line]
    variables = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, check=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=30)
    assert not done.stderr
    return {found.split("\t")[0] for found in done.stdout.splitlines()}


def complete_in_zsh(script: Path, line: str, folder: Path, wanted: set[str]) -> set[str]:
    """Type a line and tabulators at zsh's prompt until the wanted words appear; return the words that appear."""
    shell = find_shell("zsh")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", COLUMNS="200", LINES="100", PS1="", HOME=str(folder))
        os.execv(shell, ["zsh", "-f", "-i"])
    try:
        setup = f"autoload -U compinit && compinit -u -D; source {script}; echo RE''ADY\n"
        os.write(terminal, setup.encode())
        text = ""
        while "READY" not in text:
            text += _read(terminal, 30)
        os.write(terminal, line.encode())
        text = ""
        for _ in range(20):  # zsh inserts a tabulator while more keys are pending, so each one waits for the output
            os.write(terminal, b"\t")
            text += _read(terminal, 1)
            if wanted <= {*re.findall(r"[\w./-]+", text)}:
                break
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    return {*re.findall(r"[\w./-]+", text)}


def _read(terminal: int, seconds: float) -> str:
    """Return what a terminal shows until it shows nothing new for some time, which may be nothing."""
    text = ""
    while select.select([terminal], [], [], seconds)[0]:
        text += os.read(terminal, 1 << 16).decode(errors="replace")
        seconds = 0.2
    return text


@pytest.mark.parametrize("line", CASES)
def test_bash_completes_the_last_word(scripts: Path, folder: Path, line: str) -> None:
    assert complete_in_bash(scripts / "bash", line, folder) == CASES[line]
    assert not (folder / "expanded").exists()


@pytest.mark.parametrize("line", CASES)
def test_fish_completes_the_last_word(scripts: Path, folder: Path, line: str) -> None:
    found = complete_in_fish(scripts / "fish", line, folder)
    # fish also offers files, and fields of which the word is only a part
    assert {word for word in found if word.startswith(line.rpartition(" ")[2])} - {"drop.txt"} >= CASES[line]
    if not CASES[line]:
        assert not {word for word in found if word.startswith("--al")}


@pytest.mark.parametrize("line", [line for line, wanted in CASES.items() if wanted])
def test_zsh_completes_the_last_word(scripts: Path, folder: Path, line: str) -> None:
    assert CASES[line] <= complete_in_zsh(scripts / "zsh", line, folder, CASES[line])


def test_bash_script_passes_shellcheck(scripts: Path) -> None:
    assert lint_errors("#!/bin/bash\n" + (scripts / "bash").read_text()) == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_name_every_command(scripts: Path, shell: str) -> None:
    text = (scripts / shell).read_text()
    assert not [name for name in cli.COMMANDS if not re.search(rf"\b{name}\b", text)]


def test_bash_completes_the_first_word_of_every_command(scripts: Path, folder: Path) -> None:
    first_words = {name.partition(" ")[0] for name in cli.COMMANDS}
    assert complete_in_bash(scripts / "bash", "tinyllama ", folder) == first_words | {"--help", "--version"}
