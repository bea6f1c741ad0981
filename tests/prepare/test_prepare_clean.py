"""Cleaned stores: bad documents are dropped, all others kept, and interruptions change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.json_keys import read_documented_json
from tests.conftest import contents, interrupt, write_jsonl

pytest.importorskip("py3langid", reason="the extra `clean` is not installed")

from tests.prepare.cleaning import ITEM, prose, with_changed_words

from tinyllama.cli import main
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json, write_json_with_sha256
from tinyllama.prepare import decontamination
from tinyllama.prepare.inspection import find_corruption
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.tasks import plan_job
from tinyllama.recipe import Recipe


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Write six files of eight good documents each; four of them end with a bad document."""
    files = [[prose(10 * number + k) for k in range(8)] for number in range(6)]
    files[3].append(files[0][2])  # an exact copy
    files[4].append(with_changed_words(files[1][5], 2))  # a near copy
    files[2].append("Too short to be good.")
    files[5].append(f"{prose(998)}\n{ITEM}\n{prose(999)}")
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / f"raw/{number}.jsonl", texts)
    return tmp_path / "raw"


def recipe_at(small: Path, raw: Path, store: Path, **overrides: Any) -> Recipe:
    clean = {"deduplicate": "minhash", "filters": ["gopher_quality"], "decontaminate": ["herons"]}
    source = {"format": "jsonl", "path": str(raw), "weight": 1, "clean": clean}
    fields = {"data.store": str(store), "data.sources": {"web": source}, "data.validation_fraction": 0, **overrides}
    return Recipe.load(small / "recipe.yaml", fields)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_TASK_BYTES", 1)  # one task per file
    items = {"herons": [ITEM, "An item about something else that nobody has ever written into any document at all"]}
    monkeypatch.setattr(decontamination, "check_tasks", lambda tasks, place: None)
    monkeypatch.setattr(decontamination, "item_texts", lambda tasks: {task: items[task] for task in tasks})


def test_bad_documents_are_dropped_and_counted(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "store"))
    store = TokenStore.open(tmp_path / "store")
    kept = [(Path(one.file).stem, one.row) for one in store["web/train"].find_documents(range(48))]
    assert kept == [(str(number), row) for number in range(6) for row in range(8)]
    rows = store["web/train"].manifest["rows"]
    assert (rows["read"], rows["kept"], sum(rows["dropped"].values())) == (52, 48, 4)
    assert sorted(reason.partition(":")[0] for reason in rows["dropped"]) == [
        "contaminated",
        "duplicate (minhash)",
        "gopher_quality",
    ]
    found = store.manifest["sources"]["web"]["contamination"]["herons"]
    assert (found["items"], found["found"], found["documents"]) == (2, 1, 1)
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert "overlap with herons" in capsys.readouterr().out
    assert find_corruption(tmp_path / "store") == []


SHORT = "The old harbour was quiet that evening, and only two boats had returned with fish for the market. "
SHORT += "Nobody on the pier asked why the third one was late, since storms were common at that time of year."
GERMAN = "Die Katze sitzt auf dem Dach und schaut in den Garten, weil dort ein Vogel singt. "


def test_the_web_preset_counts_planted_documents_by_reason(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags of the command line set the preset and change single fields of it; one task reads two files."""
    good = [f"{prose(seed)}\nAsk anna.{seed}@acme.net at 9.9.9.{seed} or 10.0.0.1 about this." for seed in range(4)]
    rows = [(text, f"https://good.example/{number}") for number, text in enumerate(good)]
    rows += [
        (prose(20), "https://ads.bad.example/x"),
        (prose(21), ""),
        (GERMAN * 12, "https://good.example/de"),
        ("\n\n".join([prose(22, 1)] * 12), "https://good.example/repeated"),
        (SHORT, "https://good.example/short"),
        (f"{prose(24)}\nA line with lorem ipsum in it.", "https://good.example/lorem"),
        (prose(25).replace(".", ""), "https://good.example/lines"),
        (with_changed_words(good[1], 2), "https://good.example/copy"),
    ]
    for number in range(2):
        lines = [json.dumps({"text": text, "url": url}) + "\n" for text, url in rows[number::2]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "list.txt").write_text("bad.example\n", encoding="utf-8")
    sources = {"web": {"format": "jsonl", "path": str(tmp_path), "weight": 1}}
    overrides = {"data.store": str(tmp_path / "store"), "data.sources": sources, "data.validation_fraction": 0}
    recipe = Recipe.load(small / "recipe.yaml", overrides)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    flags = ["--data.sources.web.clean", "web", "--data.sources.web.clean.url_block_lists", str(tmp_path / "list.txt")]
    assert main(["prepare", str(tmp_path / "mine.yaml"), *flags]) == 0, capsys.readouterr().err
    counts = TokenStore.open(tmp_path / "store")["web/train"].manifest["rows"]
    assert counts["dropped"] == {
        "c4: lorem_ipsum": 1,
        "duplicate (minhash)": 1,
        "fineweb: line_punct_ratio": 1,
        "gopher_quality: gopher_short_doc": 1,
        "gopher_repetition: dup_para_frac": 1,
        "languages: de": 1,
        "url_block_lists: blocked domain": 1,
        "url_block_lists: no URL": 1,
    }
    assert counts["changed"] == {"e-mail addresses masked": 4, "public IPv4 addresses masked": 4}
    assert main(["inspect", str(tmp_path / "store"), "--samples", "4"]) == 0
    shown = capsys.readouterr().out
    assert "languages: de" in shown
    assert "acme" not in shown
    (tmp_path / "list.txt").write_text("good.example\n", encoding="utf-8")
    assert main(["prepare", str(tmp_path / "mine.yaml"), *flags]) == 2
    assert "another content of" in capsys.readouterr().err


def test_inspect_names_the_kept_document_of_each_duplicate(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "store"))
    duplicates = {f"{raw}/3.jsonl row 8": f"{raw}/0.jsonl row 2", f"{raw}/4.jsonl row 8": f"{raw}/1.jsonl row 5"}
    assert main(["inspect", str(tmp_path / "store"), "--duplicates"]) == 0
    lines = [f"{dropped}: duplicate (minhash) of {kept}" for dropped, kept in duplicates.items()]
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["inspect", str(tmp_path / "store"), "--duplicates", "--json"]) == 0
    found = read_documented_json("inspect --duplicates", capsys.readouterr().out)["duplicates"]
    assert {
        f"{one['file']} row {one['row']}": f"{one['kept_file']} row {one['kept_row']}" for one in found
    } == duplicates
    assert main(["inspect", str(tmp_path / "store"), "--duplicates", "--step", "3"]) == 2
    assert "--duplicates" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "line", "count"), [("minhash", "2 more duplicates", 2), (None, "no documents", 0)])
def test_inspect_counts_the_duplicates_that_are_not_listed(
    small: Path,
    raw: Path,
    tmp_path: Path,
    small_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str | None,
    line: str,
    count: int,
) -> None:
    monkeypatch.setattr("tinyllama.prepare.tasks._MAX_REJECTS_BYTES", 0)
    build_store(recipe_at(small, raw, tmp_path / "store", **{"data.sources.web.clean.deduplicate": kind}))
    assert main(["inspect", str(tmp_path / "store"), "--duplicates"]) == 0
    (shown,) = capsys.readouterr().out.splitlines()
    assert line in shown
    assert main(["inspect", str(tmp_path / "store"), "--duplicates", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["duplicates"], found["unlisted_duplicates"]) == ([], count)


def test_work_of_another_version_is_not_resumed_but_its_finished_store_is_used(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_at(small, raw, tmp_path / "store")
    interrupt(recipe, monkeypatch, 9)
    path = tmp_path / "store/.work/plan.json"
    plan = read_json(path)
    version = plan["settings"].pop("comparison_version")
    write_json(path, plan)
    with pytest.raises(InputError, match=r"store: .*another version of deduplication"):
        build_store(recipe)
    plan["settings"]["comparison_version"] = version
    write_json(path, plan)
    build_store(recipe)
    manifest = read_json(tmp_path / "store/manifest.json")
    del manifest["comparison_version"]
    write_json_with_sha256(tmp_path / "store/manifest.json", manifest)
    assert build_store(recipe) is not None


def test_workers_and_interruptions_never_change_a_cleaned_store(
    small: Path, raw: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_store(recipe_at(small, raw, tmp_path / "undisturbed"))
    recipe = recipe_at(small, raw, tmp_path / "store")
    assert sum(plan_job(recipe).stages.values()) == 30
    for after in (3, 9, 6, 5):  # finished tasks until each interruption
        interrupt(recipe, monkeypatch, after)
        assert not (tmp_path / "store/manifest.json").exists()
    build_store(recipe_at(small, raw, tmp_path / "store", **{"data.workers": 3}))
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("clean", "place", "keyword"),
    [
        ("wub", "data.sources.web.clean.preset", "web"),
        ({"preset": "web"}, "0.jsonl", "url"),
        ({"url_block_lists": "missing.txt"}, "data.sources.web.clean.url_block_lists", "missing.txt"),
        ({"url_block_lists": "list.txt"}, "list.txt:2", "not a domain"),
        ({"languages": ["en", "english"]}, "data.sources.web.clean.languages", "'english'"),
        ({"preset": "web", "url_block_lists": [], "languages": "xx"}, "data.sources.web.clean.languages", "'xx'"),
        ({"min_language_probability": 2}, "data.sources.web.clean.min_language_probability", "less than"),
        ({"filters": "c5", "language": "xx"}, "data.sources.web.clean.filters", "gopher_quality"),
    ],
    ids=["preset", "url", "missing list", "domain", "language", "language of the preset", "probability", "filters"],
)
def test_wrong_settings_are_refused_before_any_work(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clean: Any,
    place: str,
    keyword: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("good.example\nnot a domain\n", encoding="utf-8")
    write_jsonl(tmp_path / "0.jsonl", [prose(1)])
    overrides = {
        "data.store": "store",
        "data.sources": {"web": {"format": "jsonl", "path": "0.jsonl", "weight": 1}},
    }
    recipe = Recipe.load(small / "recipe.yaml", overrides)
    Path("mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert main(["prepare", "mine.yaml", "--data.sources.web.clean", json.dumps(clean)]) == 2
    error = capsys.readouterr().err.strip()
    assert place in error
    assert keyword in error
    assert "\n" not in error
    assert not Path("store").exists()


def test_new_settings_do_not_change_manifests_of_stores_without_them(small: Path) -> None:
    source = read_json(small / "store/manifest.json")["sources"]
    for fields in source.values():
        assert "url" not in fields
        assert list(fields["clean"]) == [
            "deduplicate",
            "filters",
            "decontaminate",
            "decontamination_words",
            "language",
        ]
