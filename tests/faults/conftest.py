"""A folder in which every stage of the pipeline has run, from raw text to a scored release, and copies of it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests import fork_server
from tests.conftest import small_recipe
from tests.faults.commands import assert_succeeds

STEPS = 12
RUN, RELEASE = Path("runs/small"), Path("runs/small/releases/step-00000012")
EVALUATE = ("evaluate", RELEASE, "--tasks", "piqa", "--limit", "2")


def write_recipe(folder: Path) -> None:
    """Write a recipe with relative paths, so that a copy of its folder works."""
    fields = small_recipe(Path())
    fields["train"] |= {"tokens": STEPS * 6 * 64, "validate_every_steps": 6}
    fields["checkpoint"] |= {"every_steps": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


@pytest.fixture(scope="session")
def completed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run. Read only."""
    import lm_eval.tasks  # noqa: F401 - so that no child imports it

    import tinyllama.evaluate.evaluation
    import tinyllama.release.release
    import tinyllama.report.page
    import tinyllama.train.loop  # noqa: F401

    fork_server.start()  # so that all children use it
    folder = tmp_path_factory.mktemp("completed")
    shutil.copytree(small / "raw", folder / "raw")
    write_recipe(folder)
    for command in (
        ("tokenizer", "train", "recipe.yaml", "--vocab-size", "600"),
        ("prepare", "recipe.yaml"),
        ("train", "recipe.yaml"),
        ("release", RUN, "--formats", "huggingface"),
        EVALUATE,
        ("report", RUN),
    ):
        assert_succeeds(folder, *command, fault=skip_peak)
    return folder


def skip_peak() -> None:
    """Do not measure the CPU's peak, which would take longer than these runs."""
    from tinyllama import hardware

    hardware.peak_flops = lambda device, precision: None


@pytest.fixture
def pipeline(completed: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `completed` that the test may change."""
    folder = shutil.copytree(completed, tmp_path / "pipeline", symlinks=True)
    yield folder
    for path in folder.rglob("*"):  # restore permissions that the test removed
        if path.is_dir() and not os.access(path, os.W_OK):
            path.chmod(0o755)
