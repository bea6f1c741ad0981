"""A separator or a held-out tail gives a source of one long document validation text; otherwise a remedy is shown.

A source with `min_tokens` has exactly the documents with as many tokens, and counts the others.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import contents, python_sources, small_recipe, write_jsonl
from tests.data.reading import documents_of
from tests.prepare.raw import write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.inspection import find_corruption
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.selection import sample_texts, split_tail
from tinyllama.prepare.store_warnings import HELD_OUT, holdout_remedy
from tinyllama.recipe import Recipe
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer

TEXT = "\n\n".join(python_sources(30)) + "é" * 5
store_numbers = itertools.count()


def recipe_of(small: Path, folder: Path, fraction: float = 0.1, format: str = "text", **more: Any) -> Recipe:
    """Return a recipe with a new store, whose only source is `folder/raw`."""
    fields = small_recipe(small)
    own = {"format": format, "path": str(folder / "raw"), "weight": 1, **more}
    store = folder / f"store-{next(store_numbers)}"
    fields["data"] |= {"store": str(store), "sources": {"own": own}, "validation_fraction": fraction}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return Recipe.load(folder / "recipe.yaml")


def prepared(recipe: Recipe) -> TokenStore:
    store = build_store(recipe)
    assert store is not None
    return store


def texts_of(small: Path, store: TokenStore, split: str) -> list[str]:
    tokenizer = Tokenizer.load(small / "tokenizer")
    return [tokenizer.decode(tokens[1:-1].tolist()) for tokens in documents_of(store[f"own/{split}"])]


@given(text=st.text(max_size=50), fraction=st.floats(0, 0.999))
def test_tail_is_cut_between_characters_of_string_or_bytes(text: str, fraction: float) -> None:
    head, tail = split_tail(text, fraction)
    assert to_str(head) + to_str(tail) == text
    size = len(to_str(tail).encode())
    wanted = int(len(text.encode()) * fraction)
    assert head or not text
    assert size == 0 or wanted <= size < wanted + 4
    assert [to_str(part) for part in split_tail(text.encode(), fraction)] == [head, tail]


def test_tail_of_a_single_document_is_validation_text_only(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw/book.txt", TEXT.encode())
    recipe = recipe_of(small, tmp_path, holdout="tail")
    assert main(["prepare", str(tmp_path / "recipe.yaml")]) == 0
    assert "1 rows, end held out for validation" in capsys.readouterr().out
    store = TokenStore.open(recipe.data.store)
    (head,), (tail,) = (texts_of(small, store, split) for split in ("train", "validation"))
    assert head + tail == TEXT
    assert len(tail.encode()) == pytest.approx(0.1 * len(TEXT.encode()), abs=2)
    assert store.num_validation_sequences("own", recipe.train.sequence_length) > 0
    rows = store["own/train"].manifest["rows"]
    assert rows == {"read": 1, "kept": 1, "dropped": {}, "changed": {"end held out for validation": 1}}
    assert find_corruption(store.folder) == []
    # Both parts have the provenance of the row, and the tokenizer's sample has no validation text.
    for split in ("train", "validation"):
        (document,) = store[f"own/{split}"].find_documents([0])
        assert (document.file, document.row) == (str(tmp_path / "raw/book.txt"), 0)
    assert main(["inspect", str(store.folder), "--samples", "2"]) == 0
    assert "book.txt row 0, its end" in capsys.readouterr().out
    assert list(sample_texts(recipe, 10**9)) == [head]


def test_sample_of_a_single_long_document_is_its_beginning(small: Path, tmp_path: Path) -> None:
    for number in range(5):  # by their hashes, at most one of them would be in a sample of 1 %
        text = f"{number} {TEXT}"
        write(tmp_path / "raw/book.txt", text.encode())
        for settings in ({}, {"holdout": "tail"}):
            (sample,) = sample_texts(recipe_of(small, tmp_path, 1e-9, **settings), len(text.encode()) // 25)
            assert text.startswith(sample)
            assert 0 < len(sample) <= len(text)


def test_held_out_tails_do_not_depend_on_workers(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # one file per task
    texts = python_sources(12)
    for number in range(4):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", [*texts[number * 3 : number * 3 + 3], "é"])
    one = prepared(recipe_of(small, tmp_path, format="jsonl", holdout="tail"))
    two = recipe_of(small, tmp_path, format="jsonl", holdout="tail")
    two = two.model_copy(update={"data": two.data.model_copy(update={"workers": 2})})
    assert contents(prepared(two).folder) == contents(one.folder)
    heads, tails = (texts_of(small, one, split) for split in ("train", "validation"))
    assert len(tails) == 12  # a single character has no tail
    assert [head + tail for head, tail in zip([head for head in heads if head != "é"], tails, strict=True)] == texts


def test_separated_documents_keep_their_provenance(small: Path, tmp_path: Path) -> None:
    texts = python_sources(30)
    write(tmp_path / "raw/all.txt", "<|endoftext|>".join(texts).encode())
    store = prepared(recipe_of(small, tmp_path, separator="<|endoftext|>"))
    assert sorted(texts_of(small, store, "train") + texts_of(small, store, "validation")) == sorted(texts)
    assert store["own/validation"].num_documents
    for name, split in store.splits.items():
        documents = split.find_documents(range(split.num_documents))
        assert [texts[document.row] for document in documents] == texts_of(small, store, name.removeprefix("own/"))


@pytest.mark.parametrize(("field", "value"), [("separator", "\n\n"), ("holdout", "tail"), ("min_tokens", 9)])
def test_store_of_another_selection_is_refused(small: Path, tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path / "raw/a.txt", TEXT.encode())
    recipe = recipe_of(small, tmp_path)
    prepared(recipe)
    own = recipe.data.sources["own"].model_copy(update={field: value})
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": {"own": own}})})
    with pytest.raises(InputError, match=rf"sources.own.{field} None"):
        build_store(other)


@pytest.mark.parametrize(
    ("names", "more", "fraction", "remedy"),
    [
        (["a.txt"], {}, 0.1, "raise data.validation_fraction or set data.sources.own.separator or set data"),
        (["a.txt"], {"separator": "<|x|>"}, 0.0, "raise data.validation_fraction or set data.sources.own.holdout"),
        (["a.txt"], {"holdout": "tail"}, 1e-9, "raise data.validation_fraction or set data.sources.own.separator, and"),
        (["a.jsonl"], {"format": "jsonl"}, 1e-9, "raise data.validation_fraction or set data.sources.own.holdout: t"),
        (["train/a.jsonl", "dev/a.jsonl"], {"format": "huggingface"}, 0.1, "add text to its validation files"),
    ],
)
def test_source_without_validation_text_has_a_remedy(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    more: dict[str, str],
    fraction: float,
    remedy: str,
) -> None:
    for name in names:
        text = f"{name}: a text whose hash is not small" + " more" * 100 * name.startswith(("a", "b", "t"))
        if name.endswith("txt"):
            write(tmp_path / "raw" / name, text.encode())
        else:
            write_jsonl(tmp_path / "raw" / name, [text])
    recipe = recipe_of(small, tmp_path, fraction, **{"format": "text", **more})
    assert main(["prepare", str(tmp_path / "recipe.yaml")]) == 0
    output = capsys.readouterr().out
    store = TokenStore.open(recipe.data.store)
    assert store.num_validation_sequences("own", recipe.train.sequence_length) == 0
    assert holdout_remedy(store, "own").startswith(remedy)
    assert (remedy in output) == (fraction > 0 and "dev/a.jsonl" not in names)


def test_validation_split_of_the_only_document_is_an_error(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.txt", b"the only document")
    with pytest.raises(InputError, match=r"1 rows held out for validation\); .*holdout to tail"):
        build_store(recipe_of(small, tmp_path, 0.999999))


@pytest.mark.parametrize(("num_files", "fraction"), [(100, 1.0), (100, 0.7), (200, 0.1), (10, 0.5)])
def test_sample_of_many_small_files_has_the_wanted_size(
    small: Path, tmp_path: Path, num_files: int, fraction: float
) -> None:
    for number in range(num_files):
        write(tmp_path / f"raw/{number}.txt", f"{number:06}".encode() * 100)
    total = 600 * num_files
    sample = [len(text) for text in sample_texts(recipe_of(small, tmp_path, 0), round(fraction * total))]
    assert sum(sample) == pytest.approx(fraction * total, rel=0.25)


@pytest.mark.parametrize("holdout", [None, "tail"])
@pytest.mark.parametrize("special", [True, False])
def test_documents_with_fewer_tokens_than_the_minimum_are_dropped_and_counted(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], special: bool, holdout: str | None
) -> None:
    modules, tokenizer = python_sources(8), Tokenizer.load(small / "tokenizer")
    parts = (part.strip() for part in [*modules, *"".join(modules[:3]).split("\n\n")])
    texts = [text for text in dict.fromkeys(parts) if text]

    def num_tokens(text: str) -> int:
        own = [part for part in split_tail(text, 0.1) if part] if holdout else [text]
        return sum(len(tokenizer.encode(to_str(part))) + 2 * special for part in own)

    sizes = {text: num_tokens(text) for text in texts}
    minimum = sorted(sizes.values())[len(texts) // 2]  # the size of a document, which is kept
    write_jsonl(tmp_path / "raw/a.jsonl", [*texts, ""])
    recipe = recipe_of(small, tmp_path, format="jsonl", holdout=holdout, min_tokens=minimum)
    document = recipe.data.document.model_copy(update={"bos": special, "eos": special})
    store = prepared(recipe.model_copy(update={"data": recipe.data.model_copy(update={"document": document})}))
    kept = [text for text in texts if sizes[text] >= minimum]
    rows = store["own/train"].manifest["rows"]
    held_out, reason = store["own/validation"].num_documents, f"fewer than {minimum} tokens"
    expected = {"empty text": 1, reason: len(texts) - len(kept)} | ({} if holdout else {HELD_OUT: held_out})
    assert rows["dropped"] == expected
    assert rows["read"] == len(texts) + 1 == rows["kept"] + sum(rows["dropped"].values())
    assert (rows["kept"] if holdout else rows["kept"] + held_out) == len(kept)
    documents = [document for split in store.splits.values() for document in split.find_documents(range(len(split)))]
    assert {texts[document.row] for document in documents} == set(kept)
    assert find_corruption(store.folder) == []
    assert main(["inspect", str(store.folder)]) == 0
    assert f"{len(texts) - len(kept)}  dropped: {reason}" in capsys.readouterr().out


def test_the_minimum_applies_to_validation_files_too(small: Path, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_jsonl(tmp_path / f"raw/{name}/a.jsonl", [f"short {name}", f"long {name} " * 50])
    store = prepared(recipe_of(small, tmp_path, format="huggingface", min_tokens=50))
    for split in store.splits.values():
        assert split.manifest["rows"] == {"read": 2, "kept": 1, "dropped": {"fewer than 50 tokens": 1}}


def test_minimum_above_every_document_is_an_error(small: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw/a.jsonl", ["the only document"])
    with pytest.raises(InputError, match=r"1 rows fewer than 5,000 tokens\); lower the source's min_tokens"):
        build_store(recipe_of(small, tmp_path, format="jsonl", min_tokens=5000))
