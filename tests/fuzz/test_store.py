"""A changed token store is found out and never read as if it were whole; any shards read as one array."""

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
from tests.fuzz.mutations import changed, changes, documents
from tests.fuzz.properties import few, kept_folder, one_line

from tinyllama.data.store import Split, TokenStore
from tinyllama.data.verification import find_corruption
from tinyllama.errors import InputError
from tinyllama.files import sha256_of, write_json
from tinyllama.prepare.inspection import describe
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.prepare.worker import ShardWriter
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe
from tinyllama.tokenizer.training import train_tokenizer


@cache
def store() -> Path:
    """A store of two small sources, as `prepare` makes it. Read only."""
    folder = kept_folder()
    modules = python_sources(6)
    for name in ("modules", "lines"):
        write_jsonl(folder / f"raw/{name}/a.jsonl", modules[:3] if name == "modules" else modules[4].split("\n\n")[:40])
    train_tokenizer(modules, 400).save(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder)))
    prepare_store(Recipe.load(folder / "recipe.yaml"))
    return folder / "store"


@cache
def files() -> list[str]:
    return sorted(path.relative_to(store()).as_posix() for path in store().rglob("*") if path.is_file())


@contextmanager
def own_store() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        yield Path(shutil.copytree(store(), Path(folder) / "store"))


def use(folder: Path) -> None:
    """Everything that is done with a store: it works or says why not in one line."""
    try:
        found = TokenStore.open(folder)
        for split in found.splits.values():
            _ = split.read(0, split.num_tokens), split.num_sequences(64), split.num_documents
            for document in split.documents_between(0, split.num_tokens):
                assert document.row >= 0
            assert sum(map(len, split.documents())) == split.num_tokens
        _ = list(describe(found, None)), found.digest
    except InputError as error:
        one_line(error)
    except FileNotFoundError as error:
        assert error.filename  # which the command line says


def found_out(folder: Path) -> list[str]:
    """What verifying says, every line of it one."""
    set_quiet(True)
    try:
        said = find_corruption(folder)
    except InputError as error:
        one_line(error)
        return [str(error)]
    finally:
        set_quiet(False)
    assert all(len(line.splitlines()) == 1 for line in said)
    return said


def test_a_source_whose_holdout_takes_no_document_makes_a_whole_store() -> None:
    """Found 2026-11-24: it left an empty folder, which verifying called foreign."""
    assert not (store() / "modules/validation").exists()
    assert not found_out(store())


def test_a_manifest_whose_type_of_numbers_is_empty_is_found_by_verifying() -> None:
    """Found 2026-11-24 by atheris: a traceback."""
    with own_store() as folder:
        document = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(document | {"dtype": []}))
        assert any("cannot be used" in line for line in found_out(folder))


@few(60)
@given(data=st.data(), todo=changes)
def test_any_changed_byte_is_found_and_none_ends_in_a_traceback(data: st.DataObject, todo: Any) -> None:
    name = data.draw(st.sampled_from(files()))
    with own_store() as folder:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(changed(whole, todo))
        assert bool(found_out(folder)) == (changed(whole, todo) != whole)
        use(folder)


def test_a_manifest_whose_count_is_a_list_is_found_by_name() -> None:
    """Found 2026-11-24: a list was taken for that many of itself, and verifying ended in a traceback."""
    name = next(name for name in files() if name.endswith("manifest.json") and "/" in name)
    with own_store() as folder:
        document = json.loads((folder / name).read_bytes())
        document["shards"][0]["tokens"] = [1]
        (folder / name).write_text(json.dumps(document))
        assert found_out(folder)


@few(60)
@given(data=st.data())
def test_manifests_of_any_content_are_refused_and_with_new_hashes_open_or_are_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in files() if name.endswith("manifest.json")]))
    with own_store() as folder:
        document = data.draw(documents(json.loads((folder / name).read_bytes())))
        (folder / name).write_text(json.dumps(document))
        assert found_out(folder)
        use(folder)
        rehash(folder, name)
        found_out(folder)
        with suppress(InputError, FileNotFoundError):  # of which the command line says the file
            TokenStore.open(folder)


def rehash(folder: Path, name: str) -> None:
    """Write the hashes above a changed manifest anew, as someone who means harm would."""
    top = json.loads((folder / "manifest.json").read_bytes())
    if name != "manifest.json":
        source, split, _ = name.split("/")
        top["sources"][source]["splits"][split]["manifest_sha256"] = sha256_of(folder / name)
        (folder / "manifest.json").write_text(json.dumps(top))
    (folder / "manifest.sha256").write_text(f"{sha256_of(folder / 'manifest.json')}  manifest.json\n")


@few(30)
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
                    writer.write(tokens, row)
            entries.append(writer.entry())
        write_json(folder / "manifest.json", {"shards": entries})
        split = Split(folder, np.dtype("<u2"))
        flat = [tokens for texts in shards for tokens in texts]
        whole = np.concatenate(flat)
        start, stop = sorted(round(bound * len(whole)) for bound in bounds)
        assert split.num_tokens == len(whole)
        assert np.array_equal(split.read(start, stop), whole[start:stop])
        assert [tokens.tolist() for tokens in split.documents()] == [tokens.tolist() for tokens in flat]
        with pytest.raises(IndexError):
            split.read(0, len(whole) + 1)
