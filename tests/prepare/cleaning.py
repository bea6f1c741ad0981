"""Texts and recipes for the tests of cleaning, whose stages run here as executors run them."""

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

pytest.importorskip("py3langid", reason="the extra `clean` is not installed")

from datatrove.data import Document

VOCABULARY = sorted(set(re.findall(r"\b[a-z]{3,9}\b", " ".join(topics.values()))))
ITEM = "The quick grey heron waded slowly along the muddy bank looking for small silver fish before dawn"
EXACT, MINHASH = {"deduplicate": "exact"}, {"deduplicate": "minhash"}


@dataclass
class Dropped:
    """Reason, matching evaluation items and kept document of each dropped document."""

    reasons: dict[str, str] = field(default_factory=dict)
    contaminated: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    """Id of the kept document of each duplicate."""

    def __call__(self, document: Document) -> None:
        assert document.id not in self.reasons, "dropped twice"
        self.reasons[document.id] = document.metadata["filter_reason"]
        if found := document.metadata.get(cleaning.MATCHING_ITEMS):
            self.contaminated[document.id] = found
        if kept := document.metadata.get(cleaning.KEPT_DOCUMENT):
            self.kept[document.id] = f"{kept.task}:{kept.row}"


def prose(seed: int, sentences: int = 12) -> str:
    """Return text that passes every filter, different for each seed."""
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


def recipe_with(cleanings: dict[str, dict[str, Any]], path: str = "raw") -> Recipe:
    sources = {
        name: {"format": "jsonl", "path": path, "weight": 1, "clean": clean} for name, clean in cleanings.items()
    }
    recipe = small_recipe(Path("nowhere"))
    return Recipe.model_validate(recipe | {"data": recipe["data"] | {"sources": sources}})


def truncate_new_files(folder: Path, before: dict[Path, bytes]) -> None:
    """Truncate each new or changed file, as a kill would."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if before.get(path) != (now := path.read_bytes()):
            path.write_bytes(now[: len(now) // 2])


def run(
    work: Path,
    cleanings: dict[str, dict[str, Any]],
    rows: Sequence[tuple[str, list[str]]],
    order: Callable[[int], Sequence[int]] = range,
    interrupted: bool = False,
) -> tuple[list[list[str]], Dropped]:
    """Return the texts that each task (source, texts) keeps, and the dropped documents.

    `interrupted` runs each task of a stage twice, and truncates what the first time wrote.
    """
    recipe = recipe_with(cleanings)
    cleaning.check_cleaning(recipe)

    def read(rank: int) -> Iterator[Document]:
        for number, text in enumerate(rows[rank][1]):
            yield Document(text, f"{rank}:{number}", metadata={"subset": "any", "input": 0, "row": number})

    for stage in cleaning.cleaning_stages(recipe, [source for source, _ in rows], work):
        for rank in order(stage.tasks):
            if interrupted:
                before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
                stage.run(read(rank), rank)
                truncate_new_files(work, before)
            stage.run(read(rank), rank)
    dropped = Dropped()
    kept: dict[int, list[str]] = {}
    for rank in order(len(rows)):
        documents = read(rank)
        for step in cleaning.cleaning_steps(recipe, rows[rank][0], rank, work, dropped):
            documents = step(documents)
        kept[rank] = [document.text for document in documents]
    return [kept[rank] for rank in range(len(rows))], dropped


def run_in_every_way(
    work: Path, cleanings: dict[str, dict[str, Any]], rows: Sequence[tuple[str, list[str]]]
) -> tuple[list[list[str]], Dropped]:
    """Return the result of `run` after checking that neither the order of tasks nor interruptions change it."""
    expected = run(work / "once", cleanings, rows)
    assert run(work / "reversed", cleanings, rows, lambda count: range(count)[::-1]) == expected
    assert run(work / "interrupted", cleanings, rows, interrupted=True) == expected
    return expected


def use_small_tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Put small evaluation tasks in place of lm-eval's, and return the texts of their items."""
    tasks = {
        "herons": [ITEM, prose(90, 3), "Too few words"],
        "twins": [f"In another task: {ITEM}", prose(91, 3), prose(92, 3)],
        "others": [prose(93, 3)],
    }
    monkeypatch.setattr(decontamination, "check_tasks", lambda names, place: None)
    monkeypatch.setattr(decontamination, "item_texts", lambda names: {name: tasks[name] for name in names})
    return tasks
