"""The whole way, gone once: text, tokenizer, store, a run with checkpoints, a release with scores; and copies of it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests import engine_server
from tests.conftest import small_recipe
from tests.faults.commands import run_command

STEPS = 12
RUN, RELEASE = Path("runs/small"), Path("runs/small/releases/step-00000012")
EVALUATE = ("evaluate", RELEASE, "--tasks", "piqa", "--limit", "2")


def write_recipe(folder: Path) -> None:
    """A recipe whose paths are relative, so that a copy of its folder works."""
    fields = small_recipe(Path())
    fields["train"] |= {"tokens": STEPS * 6 * 64, "validate_every_steps": 6}
    fields["checkpoint"] |= {"every_steps": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


@pytest.fixture(scope="session")
def gone(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has done its work. Read only."""
    import lm_eval.tasks  # noqa: F401 - so that no child has to

    import tinyllama.evaluate.evaluation
    import tinyllama.release
    import tinyllama.report
    import tinyllama.train.loop  # noqa: F401

    engine_server.start()  # so that each child finds it
    folder = tmp_path_factory.mktemp("gone")
    shutil.copytree(small / "raw", folder / "raw")
    write_recipe(folder)
    for words in (
        ("tokenizer", "train", "recipe.yaml", "--vocab-size", "600"),
        ("prepare", "recipe.yaml"),
        ("train", "recipe.yaml"),
        ("release", RUN, "--formats", "huggingface"),
        EVALUATE,
        ("report", RUN),
    ):
        done = run_command(folder, *words, fault=skip_peak)
        assert done.status == 0, done.said
    return folder


def skip_peak() -> None:
    """Measured after each checkpoint, it would take longer than these runs."""
    from tinyllama import hardware

    hardware.peak_flops = lambda device, precision: None


@pytest.fixture
def way(gone: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a test's own."""
    folder = shutil.copytree(gone, tmp_path / "way", symlinks=True)
    yield folder
    for path in folder.rglob("*"):  # what a test took the rights of
        if path.is_dir() and not os.access(path, os.W_OK):
            path.chmod(0o755)
