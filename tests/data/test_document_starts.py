"""The document mask of a batch follows the store's record of documents, not the token ids."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyllama.data.batches import batches, read_document_starts
from tinyllama.data.order import sequences
from tinyllama.data.store import Split, TokenStore
from tinyllama.data.writer import ShardWriter
from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.recipe import Recipe


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return Recipe.load(small / "recipe.yaml", {"train.document_mask": True})


def write_split(folder: Path, shards: list[list[int]]) -> Split:
    """Write shards of documents with these numbers of tokens; all token ids are 0."""
    entries = []
    for number, lengths in enumerate(shards):
        with ShardWriter(folder, number) as writer:
            for row, length in enumerate(lengths):
                writer.write([np.zeros(length, "<u2")], row)
        entries.append(writer.entry())
    write_json(folder / "manifest.json", {"shards": entries})
    return Split(folder, np.dtype("<u2"))


def expected_starts(lengths: list[int], start: int, stop: int) -> NDArray[np.int64]:
    """Return the document starts of tokens [start, stop) of documents with these lengths."""
    first_tokens = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    found: NDArray[np.int64] = np.maximum(first_tokens[start:stop] - start, 0)
    return found


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_starts_are_those_of_the_documents_in_any_range(shards: list[list[int]], bounds: tuple[float, float]) -> None:
    lengths = [length for own in shards for length in own]
    start, stop = sorted(round(bound * sum(lengths)) for bound in bounds)
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), shards)
        found = split.document_starts(start, stop)
        assert found.dtype == np.int32
        assert np.array_equal(found, expected_starts(lengths, start, stop))
        with pytest.raises(IndexError):
            split.document_starts(0, sum(lengths) + 1)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_mask_adds_the_starts_and_changes_no_sequence(recipe: Recipe, ranks: int) -> None:
    store = TokenStore.open(recipe.data.store)
    unmasked = Recipe.load(Path(recipe.data.store).parent / "recipe.yaml")
    splits = [store[f"{name}/train"] for name in recipe.data.sources]
    all_lengths = [[len(document) for document in split] for split in splits]
    for rank in range(ranks):
        pairs = zip(batches(recipe, store, 3, rank, ranks), batches(unmasked, store, 3, rank, ranks), strict=True)
        for step, (masked, plain) in enumerate(pairs, 3):
            assert torch.equal(masked.sequences, plain.sequences)
            assert plain.document_starts is None
            own = sequences(recipe, store, step)[rank * 6 // ranks : (rank + 1) * 6 // ranks].tolist()
            expected = [expected_starts(all_lengths[one], 64 * index, 64 * index + 64) for one, _, index in own]
            assert masked.document_starts is not None
            assert masked.document_starts.tolist() == np.stack(expected).tolist()


def test_damaged_ends_of_documents_are_named(recipe: Recipe, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    path = tmp_path / "store/lines/train/00000.documents"
    data = path.read_bytes()
    size = len(data)
    for damaged in (bytes(size), b"\xff" * size, data[: size // 2 - 4] + bytes(size // 2 + 4), data[:10], b""):
        path.write_bytes(damaged)
        split = TokenStore.open(tmp_path / "store")["lines/train"]
        with pytest.raises(InputError, match=r"lines/train/00000.documents: the ends of the documents do not match"):
            split.document_starts(0, split.num_tokens)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lines/train/00000.documents"):
        read_document_starts([(TokenStore.open(tmp_path / "store")["lines/train"], 0)], 64)


def test_the_ends_of_documents_are_prefetched(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    store, advised = TokenStore.open(recipe.data.store), set[tuple[str, int, int]]()

    def record(descriptor: int, offset: int, size: int, advice: int) -> None:
        advised.add((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, size))

    monkeypatch.setattr(os, "posix_fadvise", record)
    next(iter(batches(recipe, store, 39)))
    files = [str(store[f"{name}/train"].folder.resolve() / "00000.documents") for name in recipe.data.sources]
    assert {(file, 0, 0) for file in files} <= advised
