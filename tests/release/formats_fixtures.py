"""What the tests of formats share; they name it in `pytest_plugins`."""

import shutil
from pathlib import Path

import pytest
from tests.conftest import python_sources
from tests.release.formats import random_model, write_release

from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of Llama's kind, 600 pieces, its tokenizer.model beside its tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(python_sources(30), 600).save(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def all_formats(pieces: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in all formats. Read only."""
    return write_release(tmp_path_factory.mktemp("release"), random_model(pieces.vocab_size), pieces)


@pytest.fixture
def release(all_formats: Path, tmp_path: Path) -> Path:
    """A release of a test's own."""
    return Path(shutil.copytree(all_formats, tmp_path / "release"))
