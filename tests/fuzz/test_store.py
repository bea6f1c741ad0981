"""Any change of a token store is found; any shards read as one array."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.fuzz.strategies import (
    assert_one_line,
    edited,
    edited_documents,
    edits_of_bytes,
    fixed_examples,
    shared_folder,
)

from tinyllama.data.store import Split, TokenStore
from tinyllama.data.writer import ShardWriter
from tinyllama.errors import InputError
from tinyllama.files import sha256_of, write_json
from tinyllama.prepare.inspection import describe, find_corruption, inspection_lines
from tinyllama.prepare.pipeline import build_store
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe
from tinyllama.tokenizer.training import train_tokenizer, training_text


@cache
def valid_store() -> Path:
    """A store of two small sources, written by `prepare`. Read only."""
    folder = shared_folder()
    modules = python_sources(6)
    for name in ("modules", "lines"):
        write_jsonl(folder / f"raw/{name}/a.jsonl", modules[:3] if name == "modules" else modules[4].split("\n\n")[:40])
    train_tokenizer(training_text(modules), 400).save(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder)))
    build_store(Recipe.load(folder / "recipe.yaml"))
    return folder / "store"


@cache
def files() -> list[str]:
    return sorted(path.relative_to(valid_store()).as_posix() for path in valid_store().rglob("*") if path.is_file())


@contextmanager
def copied_store() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        yield Path(shutil.copytree(valid_store(), Path(folder) / "store"))


def use(folder: Path) -> None:
    """Check that every operation on a store works or fails in one line."""
    try:
        found = TokenStore.open(folder)
        for split in found.splits.values():
            _ = split.read(0, split.num_tokens), split.num_sequences(64), split.num_documents
            _ = split.document_starts(0, split.num_tokens)
            for document in split.documents_between(0, split.num_tokens):
                assert document.row >= 0
        described = describe(found, None, 1) | {"has_text": False, "tokenizer_path": ""}
        _ = list(inspection_lines(described)), found.digest
    except InputError as error:
        assert_one_line(error)
    except FileNotFoundError as error:
        assert error.filename  # the command line names it


def find_problems(folder: Path) -> list[str]:
    """Return the lines of `inspect --verify`."""
    set_quiet(True)
    try:
        problems = find_corruption(folder)
    except InputError as error:
        assert_one_line(error)
        return [str(error)]
    finally:
        set_quiet(False)
    assert all(len(line.splitlines()) == 1 for line in problems)
    return problems


def test_source_without_validation_documents_makes_a_valid_store() -> None:
    """Found 2026-11-24: it left an empty folder, which verification reported."""
    assert not (valid_store() / "modules/validation").exists()
    assert not find_problems(valid_store())


@fixed_examples(60)
@given(data=st.data(), edits=edits_of_bytes)
def test_any_changed_byte_is_found(data: st.DataObject, edits: Any) -> None:
    name = data.draw(st.sampled_from(files()))
    with copied_store() as folder:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(edited(original, edits))
        assert bool(find_problems(folder)) == (edited(original, edits) != original)
        use(folder)


def test_manifest_with_values_of_other_types_is_found() -> None:
    """Found 2026-11-24: an empty list as dtype, and a list that was multiplied as a count, gave a traceback."""
    shards = [{"file": "00000.tokens", "tokens": [1], "documents": 1}]
    for name, wrong in (("manifest.json", {"dtype": []}), ("modules/train/manifest.json", {"shards": shards})):
        with copied_store() as folder:
            document = json.loads((folder / name).read_bytes())
            (folder / name).write_text(json.dumps(document | wrong))
            assert find_problems(folder)


@fixed_examples(60)
@given(data=st.data())
def test_edited_manifest_is_found_and_rehashed_opens_or_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in files() if name.endswith("manifest.json")]))
    with copied_store() as folder:
        document = data.draw(edited_documents(json.loads((folder / name).read_bytes())))
        (folder / name).write_text(json.dumps(document))
        assert find_problems(folder)
        use(folder)
        rehash(folder, name)
        find_problems(folder)
        with suppress(InputError, FileNotFoundError):  # the command line names the file
            TokenStore.open(folder)


def rehash(folder: Path, name: str) -> None:
    """Update the hashes of a changed manifest, as an attacker would."""
    top = json.loads((folder / "manifest.json").read_bytes())
    if name != "manifest.json":
        source, split, _ = name.split("/")
        top["sources"][source]["splits"][split]["manifest_sha256"] = sha256_of(folder / name)
        (folder / "manifest.json").write_text(json.dumps(top))
    (folder / "manifest.sha256").write_text(f"{sha256_of(folder / 'manifest.json')}  manifest.json\n")


@fixed_examples(30)
@given(
    shards=st.lists(st.lists(arrays(np.uint16, st.integers(1, 9)), min_size=1, max_size=4), min_size=1, max_size=5),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_shards_read_as_one_array(shards: list[list[Any]], bounds: tuple[float, float]) -> None:
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as name:
        folder = Path(name)
        entries = []
        for number, texts in enumerate(shards):
            with ShardWriter(folder, number) as writer:
                for row, tokens in enumerate(texts):
                    writer.write([tokens], row)
            entries.append(writer.entry())
        write_json(folder / "manifest.json", {"shards": entries})
        split = Split(folder, np.dtype("<u2"))
        flat = [tokens for texts in shards for tokens in texts]
        expected = np.concatenate(flat)
        start, stop = sorted(round(bound * len(expected)) for bound in bounds)
        assert split.num_tokens == len(expected)
        assert np.array_equal(split.read(start, stop), expected[start:stop])
        with pytest.raises(IndexError):
            split.read(0, len(expected) + 1)
