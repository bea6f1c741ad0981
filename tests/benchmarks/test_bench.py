"""The benchmark page is written from a results file, and every benchmark script starts."""

import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if "parse_args()" in path.read_text())


def run(monkeypatch: pytest.MonkeyPatch, script: Path, *words: object) -> None:
    """Run a script in this process, where torch is already imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")


def write_results(folder: Path, change: Callable[[dict[str, Any]], object] = lambda programs: None) -> Path:
    """Write a results file of one measure, with a change of its programs."""
    programs = {
        "tinyllama": {"version": "0.1.0", "settings": "as it comes", "values": [10, 12], "found": "the same tokens"},
        "datatrove": {"version": "0.10.1", "settings": "batch size 100", "values": [2, 4]},
    }
    change(programs)
    measure = {"section": "tokenization", "name": "English", "unit": "MB/s", "more_is_better": True}
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_bytes": 2**34,
        "system": "Linux 6",
        "python": "3.11",
        "torch": "2.13",
    }
    results = {
        "date": "2026-11-24",
        "seconds": 60,
        "machine": {**machine, "product_gflops": [400, 410], "load": [0.1, 2.0]},
        "measures": [{**measure, "how": "30 MB of it.", "not_shown": "Many workers.", "programs": programs}],
    }
    path = folder / "benchmarks.json"
    path.write_text(json.dumps(results))
    return path


def test_results_file_becomes_a_table_and_a_plot(monkeypatch, tmp_path):
    run(monkeypatch, BENCHMARKS / "bench.py", "--page", write_results(tmp_path))
    page = (tmp_path / "benchmarks.md").read_text().replace("\N{EN DASH}", "-").splitlines()
    for line in (
        "| English | tinyllama | 11.0 (10.0-12.0) MB/s | |",
        "| | datatrove | 3.00 (2.00-4.00) MB/s | 4.00 (3.00-5.00) times as fast |",
        "**English** (2 rounds). 30 MB of it.",
        "- tinyllama: as it comes. Checked: the same tokens",
        "- datatrove: batch size 100",
        "- Not shown: Many workers.",
        "| datatrove | 0.10.1 |",
        "| bf16 2048^3 matrix product on all cores | 405 (400-410) GFLOP/s, before each section and after the last |",
    ):
        assert line in page
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


def test_page_in_docs_matches_its_results_with_every_peer(monkeypatch, tmp_path):
    results = ROOT / "docs/benchmarks.json"
    run(monkeypatch, BENCHMARKS / "bench.py", "--page", results, "--into", tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    measures = json.loads(results.read_text())["measures"]
    assert {measure["section"] for measure in measures} == {
        *("tokenization", "deduplication", "cleaning", "loading", "resuming", "training", "evaluation", "starting")
    }
    peers = {name.split()[0] for measure in measures for name in measure["programs"]}
    assert peers >= {"tokenizers", "sentencepiece", "gigatoken", "datatrove", "litdata", "text-dedup", "rensa"}
    assert peers >= {"marin-dupekit", "litgpt", "transformers", "torchtitan", "lm-eval"}


def test_plot_has_a_panel_per_question_with_training_first(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plot, measuring = (runpy.run_path(str(BENCHMARKS / f"{name}.py")) for name in ("bench_plot", "measuring"))
    results = measuring["read_results"](ROOT / "docs/benchmarks.json")
    compared = [measure for measure in results.measures if len(measure.programs) > 1]
    panels = dict(plot["panels_of"](results))
    shown = [(measure.name, measure.unit) for measures in panels.values() for measure in measures]
    assert sorted(shown) == sorted((measure.name, measure.unit) for measure in compared)
    assert shown[0] == ("training speed", "tokens/s")
    for axes, measures in zip(plot["draw"](results).axes, panels.values(), strict=True):
        bars = [bar.get_width() for bar in axes.patches]
        assert len(bars) == sum(len(measure.programs) for measure in measures)
        assert max(bars) > 0.4 * axes.get_xlim()[1]  # the values of another panel do not set the axis


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        (lambda programs: programs["datatrove"].pop("version"), "programs.datatrove.version"),
        (lambda programs: programs["datatrove"].update(version=""), "programs.datatrove.version"),
        (lambda programs: programs["datatrove"]["values"].pop(), "every round"),
        (lambda programs: programs.pop("tinyllama"), "tinyllama itself is missing"),
    ],
)
def test_incomplete_results_are_refused_by_name(monkeypatch, tmp_path, change, keyword):
    path = write_results(tmp_path, change)
    with pytest.raises(SystemExit, match=keyword):
        run(monkeypatch, BENCHMARKS / "bench.py", "--page", path)
    assert not path.with_suffix(".md").exists()


def test_ratio_compares_one_round_and_is_above_one_if_better(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measuring = runpy.run_path(str(BENCHMARKS / "measuring.py"))
    program = {"version": "1", "settings": "its own"}
    fields = {"section": "loading", "name": "x", "how": "x", "not_shown": "x"}
    programs = {"tinyllama": {**program, "values": [2, 8]}, "peer": {**program, "values": [4, 4]}}
    for more_is_better, expected in ((True, [0.5, 2]), (False, [2, 0.5])):
        words = {**fields, "unit": "s", "more_is_better": more_is_better, "programs": programs}
        assert measuring["ratios"](measuring["Measure"].model_validate(words), "peer") == expected


def test_turns_reverse_order_every_second_round(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measuring = runpy.run_path(str(BENCHMARKS / "measuring.py"))
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    programs = {name: partial(turn, name) for name in "ab"}
    values = measuring["take_turns"](programs, 3)
    assert "".join(order) == "abbaab"
    assert values == {"a": [1, 4, 5], "b": [2, 3, 6]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_has_help(monkeypatch, capsys, script):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, script, "--help")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_every_section_has_a_title_and_a_panel(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench, page, plot = (
        runpy.run_path(str(BENCHMARKS / f"{name}.py")) for name in ("bench", "bench_page", "bench_plot")
    )
    sections = bench["SECTIONS"].keys()
    assert page["TITLES"].keys() == bench["SECONDS"].keys() == {section for section, _ in plot["QUESTIONS"]} == sections
    assert bench["THREADED"] | bench["ON_REQUEST"] <= sections
