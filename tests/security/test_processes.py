"""Interrupts and system limits cause one-line errors; folders with unusual names work."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.conftest import small_recipe
from tests.train.launch import mount_small_disk

from tinyllama import cli
from tinyllama.errors import run_and_get_exit_status

INTERRUPTED = Path(__file__).with_name("interrupted.py")


@pytest.mark.parametrize("module", ["tyro", "pydantic", "tinyllama.api", "torch", "safetensors"])
def test_interrupt_during_import_has_no_traceback(module: str) -> None:
    command = [sys.executable, str(INTERRUPTED), module]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tinyllama: interrupted")


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))]
)
def test_process_limit_is_named(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> int:
        raise error

    assert run_and_get_exit_status(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot start more threads or processes" in line
    assert "ulimit -u" in line


NAMES = ["with space 'q\" $x", "new\nline", "e" * 250, "日本 émoji😀", "-dash", "a:b;c%20#?*[x]"]


@pytest.mark.parametrize("name", NAMES)
def test_unusual_folder_names_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / name
    (folder / name[:50]).mkdir(parents=True)
    (folder / name[:50] / "a.txt").write_text("some words\n")
    (folder / "odd.yaml").write_text(yaml.safe_dump(small_recipe(small)))
    monkeypatch.chdir(folder)
    sources = {"own": {"format": "text", "path": f"./{name[:50]}", "weight": 1}}
    if any(mark in name for mark in "*?[\n"):  # the path of a source is a glob and contains no newline
        sources["own"]["path"] = "."
    command = [
        "--quiet",
        "prepare",
        "odd.yaml",
        "--data.store",
        "store",
        "--data.validation_fraction",
        "0",
        "--data.sources",
    ]
    assert cli.main([*command, yaml.safe_dump(sources, default_flow_style=True, width=10**6)]) == 0
    assert cli.main(["--quiet", "inspect", "store", "--verify"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_full_temporary_folder_during_compile_is_named(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinyllama", "--quiet", "train", str(small / "recipe.yaml")]
    command += ["--train.compile", "true"]
    variables = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    with mount_small_disk(tmp_path / "disk", "16k") as disk:
        variables |= {"TMPDIR": str(disk), "XDG_CACHE_HOME": str(disk)}
        ended = subprocess.run(
            command, env=variables, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=250
        )
    assert ended.returncode == 1
    assert f"torch.compile has no disk space; free some space in {disk}" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
