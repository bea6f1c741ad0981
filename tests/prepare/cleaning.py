"""Rows and recipes for the tests of cleaning, and its stages run as the executors run them."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tests.conftest import small_recipe

from tinyllama.prepare import cleaning, decontamination
from tinyllama.recipe import Recipe

pytest.importorskip("spacy", reason="the extra `clean` is not installed")

from datatrove.data import Document

VOCABULARY = sorted(set(re.findall(r"\b[a-z]{3,9}\b", " ".join(topics.values()))))
ITEM = "The quick grey heron waded slowly along the muddy bank looking for small silver fish before dawn"


@dataclass
class Dropped:
    """What a counting caller sees."""

    reasons: dict[str, str] = field(default_factory=dict)
    contaminated: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def __call__(self, document: Document) -> None:
        assert document.id not in self.reasons, "a document goes once"
        self.reasons[document.id] = document.metadata["filter_reason"]
        if "contaminated" in document.metadata:
            self.contaminated[document.id] = document.metadata["contaminated"]


def prose(seed: int, sentences: int = 12) -> str:
    """Text that every filter lets pass, different for every seed."""
    chance = random.Random(seed)
    return "\n".join(
        f"The {' '.join(chance.choices(VOCABULARY, k=9))} of these have {chance.choice(VOCABULARY)}."
        for _ in range(sentences)
    )


def with_changed_words(text: str, count: int, seed: int = 0) -> str:
    chance = random.Random(seed)
    parts = text.split(" ")
    for place in chance.sample(range(len(parts)), count):
        parts[place] = chance.choice(VOCABULARY)
    return " ".join(parts)


def recipe_with(cleanings: dict[str, dict[str, Any]]) -> Recipe:
    sources = {
        name: {"format": "jsonl", "path": "raw", "weight": 1, "clean": cleaning} for name, cleaning in cleanings.items()
    }
    recipe = small_recipe(Path("nowhere"))
    return Recipe.model_validate(recipe | {"data": recipe["data"] | {"sources": sources}})


def pipe(steps: Sequence[cleaning.Step], rank: int, world: int) -> list[Document]:
    data = None
    for step in steps:
        data = step(data, rank, world)
    return list(data or ())


def tear(folder: Path, before: dict[Path, bytes]) -> None:
    """Leave half of each file that has come or changed, as a kill would."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if before.get(path) != (now := path.read_bytes()):
            path.write_bytes(now[: len(now) // 2])


def run(
    work: Path,
    cleanings: dict[str, dict[str, Any]],
    rows: Sequence[tuple[str, list[str]]],
    order: Callable[[int], Sequence[int]] = range,
    torn: bool = False,
) -> tuple[list[list[str]], Dropped]:
    """The texts that each task (source, texts) keeps, and what went; with `torn`, every rank of a stage runs twice."""
    recipe = recipe_with(cleanings)

    def read(data: None, rank: int, world: int) -> Iterator[Document]:
        for number, text in enumerate(rows[rank][1]):
            yield Document(text, f"{rank}:{number}", metadata={"subset": "any"})

    for stage in cleaning.cleaning_stages(recipe, [source for source, _ in rows], work, read):
        for rank in order(stage.tasks):
            if torn:
                before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
                pipe(stage.steps, rank, stage.tasks)
                tear(work, before)
            pipe(stage.steps, rank, stage.tasks)
    dropped = Dropped()
    kept: dict[int, list[str]] = {}
    for rank in order(len(rows)):
        chain: list[cleaning.Step] = [read, *cleaning.steps(recipe, rows[rank][0], work, dropped)]
        kept[rank] = [document.text for document in pipe(chain, rank, len(rows))]
    return [kept[rank] for rank in range(len(rows))], dropped


def backwards(count: int) -> Sequence[int]:
    return range(count)[::-1]


def run_alike(
    work: Path, cleanings: dict[str, dict[str, Any]], rows: Sequence[tuple[str, list[str]]]
) -> tuple[list[list[str]], Dropped]:
    """`run`, after finding the same result with the ranks backwards and with every rank torn and done again."""
    calm = run(work / "calm", cleanings, rows)
    assert run(work / "backwards", cleanings, rows, backwards) == calm
    assert run(work / "torn", cleanings, rows, torn=True) == calm
    return calm


EXACT, MINHASH = {"deduplicate": "exact"}, {"deduplicate": "minhash"}


def plant(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Two small tasks in the place of lm-eval's."""
    tasks = {
        "herons": [ITEM, prose(90, 3), "Too few words"],
        "twins": [f"In another task: {ITEM}", prose(91, 3), prose(92, 3)],
        "others": [prose(93, 3)],
    }
    monkeypatch.setattr(decontamination, "item_texts", lambda names: {name: tasks[name] for name in names})
    return tasks
