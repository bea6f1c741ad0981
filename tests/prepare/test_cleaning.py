"""Filters drop bad text only, in the recipe's order; missing packages and unknown languages are refused at once."""

import re
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.prepare.cleaning import (
    EXACT,
    ITEM,
    MINHASH,
    VOCABULARY,
    Dropped,
    prose,
    recipe_with,
    run,
    run_in_every_way,
    use_small_tasks,
)

from tinyllama.errors import InputError
from tinyllama.prepare import cleaning, quality
from tinyllama.prepare.languages import excerpt


def bad(seed: int) -> dict[str, tuple[str, str]]:
    """Return, by filter, a text that only this filter drops, and the reason."""
    line = prose(seed, 1)
    return {
        "gopher_repetition": ("\n\n".join([line] * 12), "gopher_repetition: dup_para_frac"),
        "gopher_quality": (prose(seed, 2), "gopher_quality: gopher_short_doc"),
        "c4": (prose(seed) + "\nA line with lorem ipsum in it.", "c4: lorem_ipsum"),
        "fineweb": (re.sub(r"\.", "", prose(seed)), "fineweb: line_punct_ratio"),
    }


@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "c4", "fineweb"])
def test_a_filter_drops_bad_text_only(tmp_path: Path, name: str) -> None:
    text, reason = bad(1)[name]
    good = [prose(seed) for seed in range(2, 6)]
    rows = [("web", [good[0], text, good[1]]), ("plain", [text]), ("web", good[2:])]
    kept, dropped = run_in_every_way(tmp_path, {"web": {"filters": [name]}, "plain": {}}, rows)
    assert kept == [good[:2], [text], good[2:]]
    assert dropped.reasons == {"0:1": reason}


def test_filters_run_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    text = "short\n\n" * 5
    for filters in (["fineweb", "gopher_quality"], ["gopher_quality", "fineweb"]):
        _, dropped = run(tmp_path, {"web": {"filters": filters}}, [("web", [text])])
        assert dropped.reasons["0:0"].startswith(filters[0])


def test_c4_drops_lines_of_kept_documents(tmp_path: Path) -> None:
    text = prose(1) + "\nNo end\nWe use cookies for all of this.\nPlease enable javascript for all of this."
    kept, dropped = run(tmp_path, {"web": {"filters": ["c4"]}}, [("web", [text])])
    assert kept == [[prose(1)]]
    assert dropped.reasons == {}


def test_gopher_quality_needs_english_stop_words_in_english_only(tmp_path: Path) -> None:
    german = " ".join(f"Heute lernen wir gemeinsam das Wort {word}." for word in VOCABULARY[::40])
    kept, _ = run(tmp_path, {"web": {"filters": ["gopher_quality"], "language": "de"}}, [("web", [german])])
    assert kept == [[german]]
    _, dropped = run(tmp_path, {"web": {"filters": ["gopher_quality"]}}, [("web", [german])])
    assert dropped.reasons == {"0:0": "gopher_quality: gopher_enough_stop_words"}


def test_a_document_too_long_for_filters_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_MAX_CHARACTERS", len(prose(1)))
    kept, dropped = run(tmp_path, {"web": {"filters": ["c4"]}}, [("web", [prose(1), prose(1) + " More."])])
    assert kept == [[prose(1)]]
    assert re.fullmatch(r"c4: over [\d,]+ characters, .*", dropped.reasons["0:1"])


def test_filters_precede_deduplication_and_decontamination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tasks(monkeypatch)
    cleanings = {"web": EXACT | {"filters": ["gopher_quality"], "decontaminate": ["herons"]}}
    item = f"{prose(1)}\n{ITEM}."
    kept, dropped = run_in_every_way(tmp_path, cleanings, [("web", [ITEM, ITEM, item]), ("web", [item, prose(2)])])
    assert kept == [[], [prose(2)]]
    assert dropped.reasons == {
        "0:0": "gopher_quality: gopher_short_doc",
        "0:1": "gopher_quality: gopher_short_doc",
        "0:2": "contaminated: herons",
        "1:0": "duplicate (exact)",
    }


def test_a_filter_never_drops_the_kept_copy_of_a_near_duplicate(tmp_path: Path) -> None:
    text = prose(1, 24)
    rows = [("web", [f"{text}\nA line with lorem ipsum.", text]), ("web", [text, f"{prose(2)}\nA line with {{ in it."])]
    kept, dropped = run_in_every_way(tmp_path, {"web": MINHASH | {"filters": ["fineweb", "c4"]}}, rows)
    assert kept == [[text], []]
    assert dropped.reasons == {"0:0": "c4: lorem_ipsum", "1:0": "duplicate (minhash)", "1:1": "c4: curly_bracket"}


def test_duplicates_are_searched_in_the_text_that_c4_keeps(tmp_path: Path) -> None:
    texts = [f"{prose(1)}\nNo end", f"{prose(1)}\nAnother line"]
    kept, _ = run(tmp_path, {"web": EXACT | {"filters": ["c4"]}}, [("web", texts)])
    assert kept == [[prose(1)]]
    rules = EXACT | {"filters": ["c4"], "c4_terminal_punctuation": False}
    kept, _ = run(tmp_path / "fineweb", {"web": rules}, [("web", [f"{text} of page." for text in texts])])
    assert len(kept[0]) == 2


@pytest.mark.parametrize(
    ("clean", "reasons"),
    [
        ({"languages": "en"}, ["de", "fr", "de"]),
        ({"languages": ["en", "de"]}, ["fr"]),
        (
            {"languages": ["en", "de", "fr"], "min_language_probability": 0.99},
            ["de with a probability below 0.99"],
        ),
    ],
    ids=["english", "two", "probability"],
)
def test_languages_are_identified(tmp_path: Path, clean: dict[str, Any], reasons: list[str]) -> None:
    german = "Der Hund schläft unter dem Baum, weil es heute sehr warm ist. "
    french = "Le chien dort sous l'arbre parce qu'il fait très chaud aujourd'hui. "
    english = "The dog sleeps under the tree, because it is very warm today. "
    texts = [english * 20, german * 20, french * 20, english + german]
    _, dropped = run(tmp_path, {"web": clean}, [("web", texts)])
    assert list(dropped.reasons.values()) == [f"languages: {reason}" for reason in reasons]


def test_only_an_excerpt_of_a_document_is_classified() -> None:
    assert excerpt("a" * 1024) == "a" * 1024
    assert excerpt("a" * 1000 + "b" * 1000) == "a" * 512 + " " + "b" * 512
    assert len(excerpt("é" * 10_000_000)) == 1025


def test_without_cleaning_there_are_no_stages(tmp_path: Path) -> None:
    recipe = recipe_with({"web": {}})
    assert cleaning.cleaning_stages(recipe, ["web"], tmp_path) == ()
    assert cleaning.cleaning_steps(recipe, "web", 0, tmp_path, Dropped()) == []


@pytest.mark.parametrize(
    ("missing", "clean", "message"),
    [
        ("py3langid", {"languages": "en"}, r"web\.clean: needs py3langid; pip install 'tinyllama\[clean\]'"),
        ("regex", {"filters": ["c4"]}, r"sources\.web\.clean: needs regex; pip install 'tinyllama\[clean\]'"),
        ("lm_eval", {"decontaminate": ["piqa"]}, r"clean: needs lm_eval; pip install 'tinyllama\[evaluate\]'"),
        (
            "none",
            {"filters": ["c4"], "language": "xx"},
            r"sources\.web\.clean\.language: no word-splitting rules for 'xx'",
        ),
        ("none", {"languages": "eng"}, r"clean\.languages: unknown language 'eng'; did you mean en\?"),
        ("none", {"languages": "deutsch"}, r"clean\.languages: unknown language 'deutsch'; .{,60}$"),
        (
            "none",
            {"filters": ["c4"], "language": "th"},
            r"sources\.web\.clean\.language: th needs pythainlp; pip install pythainlp$",
        ),
    ],
)
def test_missing_packages_and_rules_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, clean: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path, {"web": clean}, [("web", [])])
    assert "\n" not in str(error.value)


def test_deduplication_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None)
    cleaning.check_cleaning(recipe_with({"web": EXACT, "books": MINHASH | {"language": "th"}}))


@pytest.mark.long  # the index of all tasks takes 7 s
def test_an_unknown_evaluation_task_is_refused_before_any_stage() -> None:
    pytest.importorskip("lm_eval", reason="the extra `evaluate` is not installed")
    with pytest.raises(InputError, match=r"^data\.sources\.web\.clean\.decontaminate: task 'helaswag'"):
        cleaning.check_cleaning(recipe_with({"web": {"decontaminate": ["piqa", "helaswag"]}}))


@pytest.mark.parametrize("has_url", [True, False])
def test_a_source_is_refused_if_none_of_its_files_has_a_url(tmp_path: Path, has_url: bool) -> None:
    (tmp_path / "list.txt").write_text("bad.example\n", encoding="utf-8")
    (tmp_path / "0.jsonl").write_text('{"text": "without"}\n', encoding="utf-8")
    (tmp_path / "1.jsonl").write_text(f'{{"text": "b", "url": "{"a.example" * has_url}"}}\n', encoding="utf-8")
    recipe = recipe_with({"web": {"url_block_lists": [str(tmp_path / "list.txt")]}}, str(tmp_path))
    with (
        nullcontext() if has_url else pytest.raises(InputError, match=r"1\.jsonl: no row has a URL .*sources\.web\.url")
    ):
        cleaning.check_cleaning(recipe)
