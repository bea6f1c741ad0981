"""A source of one long document can be validated on, by a separator or by its end, and is told so where it is not."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import contents, python_sources, small_recipe, write_jsonl
from tests.prepare.raw import write

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.data.verification import find_corruption
from tinyllama.errors import InputError
from tinyllama.prepare.pipeline import prepare_store
from tinyllama.prepare.selection import sample_texts, split_tail
from tinyllama.prepare.store_warnings import holdout_remedy
from tinyllama.recipe import Recipe
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer

TEXT = "\n\n".join(python_sources(30)) + "é" * 5


def recipe_of(small: Path, folder: Path, share: float = 0.1, format: str = "text", **more: Any) -> Recipe:
    """A recipe whose only source is what lies in `folder/raw`."""
    fields = small_recipe(small)
    own = {"format": format, "path": str(folder / "raw"), "weight": 1, **more}
    store = folder / f"store-{next(_number)}"
    fields["data"] |= {"store": str(store), "sources": {"own": own}, "validation_fraction": share}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return Recipe.load(folder / "recipe.yaml")


_number = itertools.count()


def prepared(recipe: Recipe) -> TokenStore:
    store = prepare_store(recipe)
    assert store is not None
    return store


def texts_of(small: Path, store: TokenStore, split: str) -> list[str]:
    tokenizer = Tokenizer.load(small / "tokenizer")
    return [tokenizer.decode(tokens[1:-1].tolist()) for tokens in store[f"own/{split}"].documents()]


@given(text=st.text(max_size=50), share=st.floats(0, 0.999))
def test_a_text_s_end_is_cut_off_between_two_characters_whether_string_or_bytes(text: str, share: float) -> None:
    head, tail = split_tail(text, share)
    assert to_str(head) + to_str(tail) == text
    size = len(to_str(tail).encode())
    wanted = int(len(text.encode()) * share)
    assert head or not text
    assert size == 0 or wanted <= size < wanted + 4
    parts = [to_str(part) for part in split_tail(text.encode(), share)]
    assert parts == [head, tail]


def test_the_end_of_a_single_document_is_validated_on_and_never_trained_on(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw/book.txt", TEXT.encode())
    recipe = recipe_of(small, tmp_path, holdout="tail")
    assert main(["prepare", str(tmp_path / "recipe.yaml")]) == 0
    assert "    changed: 1 rows, end held out for validation" in capsys.readouterr().out.splitlines()
    store = TokenStore.open(recipe.data.store)
    (head,), (tail,) = (texts_of(small, store, split) for split in ("train", "validation"))
    assert head + tail == TEXT
    assert len(tail.encode()) == pytest.approx(0.1 * len(TEXT.encode()), abs=2)
    assert store.num_validation_sequences("own", recipe.train.sequence_length) > 0
    rows = store["own/train"].manifest["rows"]
    assert rows == {"read": 1, "kept": 1, "left_out": {}, "changed": {"end held out for validation": 1}}
    assert find_corruption(store.folder) == []
    # Both parts lead back to the row, and training's sample has no text of the end.
    for split in ("train", "validation"):
        (document,) = store[f"own/{split}"].find_documents([0])
        assert (document.file, document.row) == (str(tmp_path / "raw/book.txt"), 0)
    assert main(["inspect", str(store.folder)]) == 0
    assert "book.txt row 0, its end" in capsys.readouterr().out
    assert list(sample_texts(recipe, 10**9)) == [head]


def test_a_sample_of_a_single_long_document_is_its_beginning(small: Path, tmp_path: Path) -> None:
    for number in range(5):  # by its hash, at most one of them would be in a sample of a hundredth
        text = f"{number} {TEXT}"
        write(tmp_path / "raw/book.txt", text.encode())
        for how in ({}, {"holdout": "tail"}):
            (sample,) = sample_texts(recipe_of(small, tmp_path, 1e-9, **how), len(text.encode()) // 25)
            assert text.startswith(sample)
            assert 0 < len(sample) <= len(text)


def test_held_out_ends_are_the_same_however_many_workers_there_are(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MOST_BYTES", 1)  # a task a file
    texts = python_sources(12)
    for number in range(4):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", [*texts[number * 3 : number * 3 + 3], "é"])
    one = prepared(recipe_of(small, tmp_path, format="jsonl", holdout="tail"))
    two = recipe_of(small, tmp_path, format="jsonl", holdout="tail")
    two = two.model_copy(update={"data": two.data.model_copy(update={"workers": 2})})
    assert contents(prepared(two).folder) == contents(one.folder)
    heads, tails = (texts_of(small, one, split) for split in ("train", "validation"))
    assert len(tails) == 12  # one character has no end of its own
    assert [head + tail for head, tail in zip([head for head in heads if head != "é"], tails, strict=True)] == texts


def test_a_separator_makes_documents_of_one_file_that_lead_back_to_their_place(small: Path, tmp_path: Path) -> None:
    texts = python_sources(30)
    write(tmp_path / "raw/all.txt", "<|endoftext|>".join(texts).encode())
    recipe = recipe_of(small, tmp_path, separator="<|endoftext|>")
    store = prepared(recipe)
    assert sorted(texts_of(small, store, "train") + texts_of(small, store, "validation")) == sorted(texts)
    assert store["own/validation"].num_documents
    for split in ("train", "validation"):
        found = store[f"own/{split}"].find_documents(range(store[f"own/{split}"].num_documents))
        assert [texts[document.row] for document in found] == texts_of(small, store, split)


def test_another_separator_or_holdout_is_another_store_but_none_is_that_of_before(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.txt", TEXT.encode())
    recipe = recipe_of(small, tmp_path)
    prepared(recipe)
    for field, value in (("separator", "\n\n"), ("holdout", "tail")):
        own = recipe.data.sources["own"].model_copy(update={field: value})
        other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": {"own": own}})})
        with pytest.raises(InputError, match=rf"made with sources.own.{field} None, the recipe says"):
            prepare_store(other)


@pytest.mark.parametrize(
    ("names", "more", "share", "remedy"),
    [
        (["a.txt"], {}, 0.1, "set data.sources.own.separator or data.sources.own.holdout: tail, and"),
        (["a.txt"], {"separator": "<|x|>"}, 0.1, "set data.sources.own.holdout: tail, and"),
        (["a.txt"], {}, 0.0, "raise data.validation_fraction and set data.sources.own.separator or"),
        (["a.txt", "b.txt"], {}, 1e-9, "raise data.validation_fraction or set data.sources.own.separator or data"),
        (["a.txt"], {"holdout": "tail"}, 1e-9, "raise data.validation_fraction or set data.sources.own.separator, and"),
        (["a.jsonl"], {"format": "jsonl"}, 1e-9, "set data.sources.own.holdout: tail, and"),
        (["train/a.jsonl", "dev/a.jsonl"], {"format": "huggingface"}, 0.1, "add text to its validation files"),
    ],
)
def test_where_nothing_is_held_out_what_helps_is_named(
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    more: dict[str, str],
    share: float,
    remedy: str,
) -> None:
    for name in names:
        text = f"{name}: so much text that no hash of it is small" + " more" * 100 * name.startswith(("a", "b", "t"))
        write(tmp_path / "raw" / name, text.encode()) if name.endswith("txt") else write_jsonl(
            tmp_path / "raw" / name, [text]
        )
    recipe = recipe_of(small, tmp_path, share, **{"format": "text", **more})
    assert main(["prepare", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    store = TokenStore.open(recipe.data.store)
    assert store.num_validation_sequences("own", recipe.train.sequence_length) == 0
    assert holdout_remedy(store, "own").startswith(remedy)
    assert ("nothing is held out for validation; " in said) == (share > 0 and "dev/a.jsonl" not in names)


def test_where_validation_took_the_only_document_the_remedy_is_about_holding_out(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "raw/a.txt", b"the only document")
    with pytest.raises(
        InputError, match=r"1 rows held out for validation\); set the source's holdout to tail, .*separator .*or lower"
    ):
        prepare_store(recipe_of(small, tmp_path, 0.999999))
