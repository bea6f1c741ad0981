"""The first copy is kept, near or exact, in any order and after interruptions; signatures are datatrove's."""

import resource
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st
from tests.prepare.cleaning import (
    EXACT,
    MINHASH,
    Dropped,
    prose,
    recipe_with,
    run,
    run_in_every_way,
    with_changed_words,
)

from tinyllama.errors import InputError
from tinyllama.prepare import cleaning, decontamination, deduplication
from tinyllama.prepare.decontamination import words


def test_the_first_of_equal_documents_is_kept_across_sources(tmp_path: Path) -> None:
    a, b, c = prose(1), prose(2), prose(3)
    # The second task has `a` in its first row.
    rows = [("plain", [b]), ("web", [prose(4), a, a]), ("books", [a, b, c]), ("books", []), ("web", [c, b, b + " "])]
    kept, dropped = run_in_every_way(tmp_path, {"plain": {}, "web": EXACT, "books": EXACT}, rows)
    assert kept == [[b], [prose(4), a], [b, c], [], [b + " "]]
    assert dropped.reasons == dict.fromkeys(["1:2", "2:0", "4:0", "4:1"], "duplicate (exact)")


def test_the_first_of_near_equal_documents_is_kept_across_sources(tmp_path: Path) -> None:
    long, other = prose(1, 60), prose(2, 60)
    near = [with_changed_words(long, 3, seed) for seed in range(6)]
    rows = [
        ("plain", [long]),
        ("web", [other, near[0], near[1]]),
        ("books", [near[2], prose(3, 60), near[3], with_changed_words(other, 300)]),
        ("web", [near[4], "four words a row", "four words a row", near[5]]),
    ]
    kept, dropped = run_in_every_way(tmp_path, {"plain": {}, "web": MINHASH, "books": MINHASH}, rows)
    assert kept == [[long], [other, near[0]], [prose(3, 60), rows[2][1][3]], ["four words a row"] * 2]
    assert dropped.reasons == dict.fromkeys(["1:2", "2:0", "2:2", "3:0", "3:3"], "duplicate (minhash)")


def test_sources_with_different_kinds_are_not_compared(tmp_path: Path) -> None:
    a, b = prose(1), prose(2)
    rows = [("web", [a]), ("books", [a, b]), ("web", [b])]
    kept, dropped = run(tmp_path, {"web": EXACT, "books": MINHASH}, rows)
    assert kept == [[a], [a, b], [b]]
    assert dropped.reasons == {}


def test_missing_documents_after_the_comparison_are_an_error(tmp_path: Path) -> None:
    run(tmp_path, {"web": EXACT}, [("web", [prose(1), prose(1)])])
    (step,) = cleaning.cleaning_steps(recipe_with({"web": EXACT}), "web", 0, tmp_path, Dropped())
    with pytest.raises(InputError, match="document 1 of task 0"):
        list(step(iter([Document(prose(1), "0:0")])))


@pytest.mark.parametrize("asked", [EXACT, MINHASH])
def test_repeated_stages_forget_the_documents_of_the_first_run(tmp_path: Path, asked: dict[str, Any]) -> None:
    first = [("web", [prose(1), prose(2)]), ("web", [prose(1), prose(2)] * 9)]
    second = [("web", [prose(1), prose(3)]), ("web", [prose(4), prose(5), prose(6)])]
    run(tmp_path / "again", {"web": asked}, first)
    assert run(tmp_path / "again", {"web": asked}, second) == run(tmp_path / "new", {"web": asked}, second)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 5))
def test_duplicates_are_all_but_the_least_of_each_component(pairs: list[tuple[int, int]], parts: int) -> None:
    groups: list[set[int]] = []
    for pair in pairs:
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    expected = sorted(node for group in groups for node in group - {min(group)})
    found = deduplication.duplicates_in_clusters(
        np.array(pairs[part::parts], dtype=np.uint64).reshape(-1, 2) for part in range(parts)
    )
    assert found.tolist() == expected


def test_minhash_signatures_equal_those_of_datatrove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datatrove.pipeline.dedup import MinhashDedupSignature

    texts = [prose(seed, 30) for seed in range(3)]

    def documents() -> Iterator[Document]:
        return (Document(text, str(number)) for number, text in enumerate(texts))

    MinhashDedupSignature(str(tmp_path / "theirs/signatures"), deduplication._minhash_config()).run(documents(), 0, 1)
    monkeypatch.setattr(deduplication, "_MINHASH_NGRAMS", 7)
    monkeypatch.setattr(decontamination, "_PART_CHARACTERS", 50)
    deduplication.sign_minhash(tmp_path / "ours", ["en"], documents(), 0)
    for theirs in (tmp_path / "theirs").rglob("*.sig"):
        assert (tmp_path / "ours" / theirs.relative_to(tmp_path / "theirs")).read_bytes() == theirs.read_bytes()


def test_words_of_a_text_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(topics.values())[:20_000] + " ÄΣ\u0301 1,5\u20032\n\n \u2019s don't e.g. IS_ALPHA"
    expected = list(words(text, "en"))
    monkeypatch.setattr(decontamination, "_PART_CHARACTERS", 13)
    assert list(words(text, "en")) == expected


def test_too_low_a_limit_of_open_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    with pytest.raises(InputError, match="open files, but the limit is 200"):
        run(tmp_path, {"web": MINHASH}, [("web", [prose(1)])])
