"""The first copy is kept, near or exact, in any order and after interruptions, and similar documents are found."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st
from tests.prepare.cleaning import (
    EXACT,
    MINHASH,
    VOCABULARY,
    Dropped,
    prose,
    recipe_with,
    run,
    run_in_every_way,
    with_changed_words,
)

from tinyllama.errors import InputError
from tinyllama.prepare import cleaning, deduplication, words
from tinyllama.prepare.ngrams import hashed_ngrams


def test_the_first_of_equal_documents_is_kept_across_sources(tmp_path: Path) -> None:
    a, b, c = prose(1), prose(2), prose(3)
    # The second task has `a` in its first row.
    rows = [("plain", [b]), ("web", [prose(4), a, a]), ("books", [a, b, c]), ("books", []), ("web", [c, b, b + " "])]
    kept, dropped = run_in_every_way(tmp_path, {"plain": {}, "web": EXACT, "books": EXACT}, rows)
    assert kept == [[b], [prose(4), a], [b, c], [], [b + " "]]
    assert dropped.reasons == dict.fromkeys(["1:2", "2:0", "4:0", "4:1"], "duplicate (exact)")
    assert dropped.kept == {"1:2": "1:1", "2:0": "1:1", "4:0": "2:2", "4:1": "2:1"}


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
    assert dropped.kept == dict.fromkeys(dropped.reasons, "1:1")


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


@pytest.mark.parametrize("clean", [EXACT, MINHASH])
def test_repeated_stages_replace_the_documents_of_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: dict[str, Any]
) -> None:
    for name, value in (("_BLOCK_KEYS", 1), ("_BATCH_NGRAMS", 50), ("_SEARCH_KEYS", 1 if clean == EXACT else 1000)):
        monkeypatch.setattr(deduplication, name, value)  # several files per task
    first = [("web", [prose(1), prose(2)]), ("web", [prose(1), prose(2)] * 4)]
    second = [("web", [prose(1), prose(3)]), ("web", [prose(4), prose(5), prose(6)])]
    run(tmp_path / "again", {"web": clean}, first)
    assert run(tmp_path / "again", {"web": clean}, second) == run(tmp_path / "new", {"web": clean}, second)


def test_long_documents_have_the_same_keys_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(1, 40), prose(2), "four words a row", "", prose(3, 40), prose(4)]

    def all_keys() -> list[list[int]]:
        return [np.concatenate(part).tolist() for part in zip(*deduplication.minhash_keys(iter(texts)), strict=True)]

    expected = all_keys()
    monkeypatch.setattr(words, "_PART_CHARACTERS", 100)
    for num_ngrams in (7, 100, 1 << 15):
        monkeypatch.setattr(deduplication, "_BATCH_NGRAMS", num_ngrams)
        assert all_keys() == expected


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_neither_blocks_nor_parts_of_a_range_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    texts = [with_changed_words(prose(seed % 20, 6), seed // 20) for seed in range(60)] + [prose(1, 6)] * 3
    rows = [("web", texts[::2]), ("web", []), ("web", texts[1::2])]
    expected = run(tmp_path / "once", {"web": {"deduplicate": kind}}, rows)
    assert len(expected[1].kept) >= (40 if kind == "minhash" else 3)
    for name in ("_BLOCK_KEYS", "_BATCH_NGRAMS", "_CLUSTER_DOCUMENTS"):
        monkeypatch.setattr(deduplication, name, 20)
    monkeypatch.setattr(deduplication, "_SEARCH_KEYS", 1 if kind == "exact" else 50)
    monkeypatch.setattr(words, "_PART_CHARACTERS", 100)
    assert run(tmp_path / "parts", {"web": {"deduplicate": kind}}, rows) == expected
    assert len(list((tmp_path / "parts" / kind / "pairs").glob("*"))) > len(list((tmp_path / "once").rglob("pairs/*")))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 5))
def test_the_lowest_document_of_each_component_is_kept(pairs: list[tuple[int, int]], parts: int) -> None:
    groups: list[set[int]] = [{number} for number in range(31)]
    for pair in pairs:
        joined = set[int]().union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    expected = [min(group) for number in range(31) for group in groups if number in group]
    found = deduplication.kept_documents(
        31, (np.array(pairs[part::parts], int).reshape(-1, 2).T for part in range(parts))
    )
    assert found.tolist() == expected


def texts_with_similarity(similarity: float, count: int, ngrams: int = 90) -> Iterator[tuple[str, str]]:
    """Yield pairs of texts of random words; a fraction `similarity` of the 5-grams of a pair is in both texts."""
    chance = random.Random(similarity)
    shared = round(2 * ngrams * similarity / (1 + similarity))
    for _ in range(count):
        common, *others = (
            " ".join(chance.choices(VOCABULARY, k=length)) for length in (shared + 4, ngrams - shared, ngrams - shared)
        )
        yield f"{common} {others[0]}", f"{common} {others[1]}"


@pytest.mark.parametrize(
    ("similarity", "least", "most"), [(0.8, 0.95, 1), (0.4, 0, 0.01)], ids=["similar", "different"]
)
def test_pairs_are_found_by_their_similarity(similarity: float, least: float, most: float) -> None:
    # The expected fractions are 0.969 and 0.006, with standard errors of 0.004 and 0.0018.
    count = 2000
    texts = [text for pair in texts_with_similarity(similarity, count) for text in pair]
    numbers, keys = (np.concatenate(part) for part in zip(*deduplication.minhash_keys(iter(texts)), strict=True))
    assert numbers.tolist() == np.repeat(np.arange(2 * count), deduplication.BANDS).tolist()
    bands = keys.reshape(count, 2, deduplication.BANDS)
    assert least <= (bands[:, 0] == bands[:, 1]).any(axis=1).mean() <= most
    assert len(np.unique(keys)) == keys.size - (bands[:, 0] == bands[:, 1]).sum()  # other documents share no key


def test_hash_functions_estimate_the_similarity_without_bias() -> None:
    chance = np.random.default_rng(0)
    ngrams = chance.integers(0, 1 << 32, (400, 300), dtype=np.uint32)
    starts = np.arange(0, 400 * 200, 200)
    first, second = (deduplication.minimum_hashes(part.ravel(), starts) for part in (ngrams[:, :200], ngrams[:, 100:]))
    estimates = (first == second).mean(axis=0)  # the similarity is 100 / 300
    rows = deduplication.BANDS * deduplication.ROWS
    deviation = (1 / 3 * 2 / 3 / rows) ** 0.5  # of independent hash functions
    assert abs(estimates.mean() - 1 / 3) < 4 * deviation / 400**0.5
    assert estimates.std() < 1.15 * deviation


@pytest.mark.parametrize(
    ("text", "other", "is_near"),
    [
        ("Der Fluß führt viel Wasser, über 1000 Liter.", "DER FLUẞ FUHRT VIEL WASSER: U\u0308BER 2 LITER", True),
        ("Река течёт на север через леса.", "РЕКА ТЕЧЁТ (НА СЕВЕР) ЧЕРЕЗ ЛЕСА", True),  # noqa: RUF001
        ("河水向北流过森林。", "「河水向北流过森林」", True),
        ("河水向北流过森林。", "河水向南流过田野。", False),
        ("मेरा नाम राम है और", "मेरा नाम राम है।  और!", True),
    ],
    ids=["german", "russian", "chinese", "other chinese", "hindi"],
)
def test_case_punctuation_accents_and_numbers_do_not_matter(text: str, other: str, is_near: bool) -> None:
    (first, second) = (set(np.concatenate(list(hashed_ngrams(one, 5))).tolist()) for one in (text, other))
    assert first
    assert (first == second) is is_near
