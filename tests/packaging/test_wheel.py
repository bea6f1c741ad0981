"""The wheel, installed and run without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since a build writes folders next to its sources and reuses old ones.
    shutil.copytree(CHECKOUT / "src/tinyllama", folder / "src/tinyllama", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, folder)
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")
    run(sys.executable, *command, folder=folder)
    (built,) = (folder / "dist").glob("tinyllama-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment with the wheel, which also finds the libraries installed here."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    (own,) = (folder / "venv/lib").glob("python*/site-packages")
    # In this way, .pth files in that folder, such as the repository's, are not read.
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_wheel_contains_all_package_files(wheel: Path) -> None:
    package = CHECKOUT / "src/tinyllama"
    here = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert there == {name for name in here if "__pycache__" not in name}
    assert {"tinyllama/py.typed", "tinyllama/recipes/demo.yaml", "tinyllama/report/page.css"} <= there


def test_installed_wheel_works_without_checkout(installed: Path) -> None:
    tinyllama, describe = installed / "venv/bin/tinyllama", Path(__file__).with_name("describe_installation.py")
    found = json.loads(run(installed / "venv/bin/python", "-P", describe, folder=installed))
    assert Path(found["file"]).is_relative_to(installed)
    assert {"", "clean", "evaluate", "float8", "formats", "ray", "track"} == set(found["unmet"])
    assert not found["unmet"][""]
    assert "tokenizer train" in run(tinyllama, "--help", folder=installed)
    assert "train.tokens" in run(tinyllama, "train", "demo", "--help", folder=installed)
    plan = json.loads(run(tinyllama, "plan", "demo", "--hardware", "h100", "--json", folder=installed))
    assert plan["name"] == "demo"
