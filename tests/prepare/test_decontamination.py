"""Documents that contain an evaluation item in any spelling are dropped, and no others."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from tests.prepare.cleaning import ITEM, prose, run, run_in_every_way, use_small_tasks, with_changed_words

from tinyllama.prepare import decontamination
from tinyllama.prepare.decontamination import overlap, read_index
from tinyllama.recipe import Cleaning


def test_documents_with_an_evaluation_item_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = use_small_tasks(monkeypatch)
    respelled = ITEM.upper().replace(" ", ",  ").replace("É", "E")
    part = " ".join(ITEM.split()[4:17])
    too_short_part = " ".join(ITEM.split()[5:17])  # 12 words
    rows = [
        ("web", [prose(1), f"{prose(2)} {respelled} {prose(3)} {tasks['twins'][2]}", f"{prose(4)} {too_short_part}"]),
        ("plain", [ITEM]),
        ("web", [f"{prose(5)} {part}", f"{prose(6)} {tasks['herons'][2]}", f"{prose(7)} {tasks['others'][0]}"]),
    ]
    cleanings: dict[str, Any] = {"web": {"decontaminate": ["herons", "twins"]}, "plain": {}}
    kept, dropped = run_in_every_way(tmp_path, cleanings, rows)
    assert kept == [[rows[0][1][0], rows[0][1][2]], [ITEM], rows[2][1][1:]]
    assert dropped.reasons == dict.fromkeys(["0:1", "2:0"], "contaminated: herons, twins")
    assert dropped.contaminated["0:1"] == {"herons": [0], "twins": [0, 2]}
    assert overlap(
        read_index(tmp_path / "once/decontamination", Cleaning(**cleanings["web"])), dropped.contaminated.values()
    ) == {
        "herons": {"items": 3, "too_short": 1, "found": 1, "documents": 2},
        "twins": {"items": 3, "too_short": 0, "found": 2, "documents": 2},
    }


def test_each_source_has_its_own_tasks_and_ngram_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = use_small_tasks(monkeypatch)
    texts = [" ".join(ITEM.split()[:8]), tasks["others"][0]]
    cleanings: dict[str, dict[str, Any]] = {
        "web": {"decontaminate": ["herons"], "decontamination_words": 8},
        "books": {"decontaminate": ["others"]},
    }
    kept, dropped = run(tmp_path, cleanings, [("web", texts), ("books", texts)])
    assert kept == [texts[1:], texts[:1]]
    assert dropped.reasons == {"0:0": "contaminated: herons", "1:1": "contaminated: others"}
    counts = overlap(read_index(tmp_path / "decontamination", Cleaning(**cleanings["books"])), [])
    assert counts == {"others": {"items": 1, "too_short": 0, "found": 0, "documents": 0}}


def test_documents_match_the_items_that_share_a_sequence_of_words() -> None:
    items = [prose(seed, 3) for seed in range(5)]
    chance = random.Random(0)
    texts = [with_changed_words(items[seed % 5], chance.randrange(30), seed) for seed in range(60)]
    index = decontamination.build_index({"task": items}, 6)

    def sequences(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[place : place + 6]) for place in range(len(words) - 5)}

    for text in texts:
        expected = [number for number, item in enumerate(items) if sequences(item) & sequences(text)]
        assert decontamination.matching_items(index, text, 6) == ({"task": expected} if expected else {})
    assert 5 < sum(not decontamination.matching_items(index, text, 6) for text in texts) < 55


def test_sources_with_the_same_tasks_share_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tasks(monkeypatch)
    clean: dict[str, Any] = {"decontaminate": ["herons"]}
    cleanings = {"web": clean, "books": clean, "code": clean | {"decontamination_words": 8}}
    run(tmp_path, cleanings, [(name, [prose(1)]) for name in cleanings])
    assert len(list((tmp_path / "decontamination").iterdir())) == 2


@pytest.mark.slow
def test_items_of_real_tasks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
