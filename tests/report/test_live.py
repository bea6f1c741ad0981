"""The live page in a real browser while a real process trains, and what it shows of a run's files."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import pytest
import yaml
from playwright.sync_api import Page, expect
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.tracking.run_files import BATCH_TOKENS, new_run, write_resume, write_steps

from tinyllama.cli import main
from tinyllama.report.content import MetricsReader, read_run
from tinyllama.report.live import LivePage
from tinyllama.report.page import write_report
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

_ENDLESS_STEPS = 1_000_000
_WAIT_MS = 60_000
PROGRAM = Path(__file__).with_name("interruptible_program.py")


@contextmanager
def running(folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the program until the block ends."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()


@contextmanager
def watched(folder: Path, *runs: str, browser: bool = False) -> Iterator[str]:
    """Serve the page; yield its address."""
    with running(folder, "watch", *runs, *([] if browser else ["--no-browser"])) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\S*", process.stdout.readline())
        assert found, process.poll()
        yield found[0]
    assert process.returncode == 0


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return new_run(tmp_path)[1]


def visible_line(page: Page) -> Any:
    """Return the training curve that is visible."""
    return page.locator("#chart-loss svg.drawing:visible .training .line:visible")


@pytest.fixture(scope="module")
def training(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which an endless run is training."""
    folder = tmp_path_factory.mktemp("training")
    fields = ["--train.tokens", _ENDLESS_STEPS * BATCH_TOKENS, "--train.validate_every_steps", 50]
    with running(folder, "train", small / "recipe.yaml", *fields, "--checkpoint.every_steps", 10**6):
        metrics = folder / "runs/small/metrics.jsonl"
        for _ in range(600):
            if metrics.is_file() and "validation_loss" in metrics.read_text():
                break
            time.sleep(0.1)
        else:
            pytest.fail("no validation within a minute")
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)])
def test_curve_of_a_training_run_grows_and_keeps_what_the_reader_chose(
    training: Path, scheme: Literal["light", "dark"], size: tuple[int, int]
) -> None:
    with watched(training) as address, opened(address, scheme, size) as seen:
        page = seen.page
        page.evaluate("window.isFirst = true")
        chart = page.locator("#chart-loss svg.wide")
        tokens, linear = chart.get_attribute("data-end"), visible_line(page).get_attribute("d")
        assert tokens
        page.locator("#chart-loss .switch input").check()
        page.locator("summary", has_text="Complete recipe").click()
        assert visible_line(page).get_attribute("d") != linear
        logarithmic = visible_line(page).get_attribute("d")
        expect(chart).not_to_have_attribute("data-end", tokens, timeout=_WAIT_MS)
        assert float(chart.get_attribute("data-end") or 0) > float(tokens)
        assert page.evaluate("window.isFirst")  # never reloaded
        assert visible_line(page).get_attribute("d") != logarithmic
        expect(page.locator("#chart-loss .switch input")).to_be_checked()
        expect(page.locator("pre")).to_be_visible()
        expect(page.locator("#connection")).to_have_text("live")
        status = page.locator(".status").inner_text()
        assert re.search(r"Step [\d,]+ of 1,000,000, about .* left", status)
        assert page.locator(".state").inner_text() == "running"
        assert page.locator("#chart-loss svg.drawing:visible .log .validation .line").count() == 1
        assert seen.external_requests() == []
        assert page.evaluate("document.scrollingElement.scrollWidth") == size[0]
        keep_screenshot(page, f"watch-{'phone' if size == PHONE else 'desktop'}-{scheme}", full_page=True)


@pytest.mark.slow
def test_values_appear_under_the_pointer_and_follow_the_run(training: Path) -> None:
    with watched(training) as address, opened(address) as seen:
        page, tip = seen.page, seen.page.locator("#tip")
        chart = page.locator("#chart-loss svg.wide")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        assert box
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.6 * box["height"])
        expect(tip).to_contain_text(re.compile(r"step [\d,]+, [\d.]+[KM]? tokens"))
        expect(tip).to_contain_text(re.compile(r"training, running mean: [\d.]+ nats per token"))
        expect(tip).to_contain_text(re.compile(r"validation: [\d.]+ nats per token"))
        before = tip.inner_text()
        expect(tip).not_to_have_text(before, timeout=_WAIT_MS)  # the curve has moved below the pointer
        expect(tip).to_be_visible()
        assert page.locator(".cursor").count() == 1
        page.mouse.move(2, 2)
        expect(tip).to_be_hidden()
        throughput = page.locator("#chart-tokens_per_second svg.drawing")
        throughput.hover()
        expect(tip).to_contain_text(re.compile(r"Throughput, running mean: [\d.]+[KM]? tokens/s"))
        expect(page.locator("#chart-validation-by-source .legend li")).to_have_text(["modules", "lines"])
        page.locator("#chart-validation-by-source svg.drawing").hover()
        expect(tip).to_contain_text(re.compile(r"modules: [\d.]+ bits per byte.*\nlines: [\d.]+ bits per byte"))


@pytest.mark.slow
def test_sample_and_mark_with_its_words_appear(tmp_path: Path, log: RunLog) -> None:
    write_steps(log, 1, 30)
    with watched(tmp_path, "runs/small") as address, opened(address) as seen:
        page = seen.page
        assert page.locator("#section-samples").count() == 0
        assert page.locator("svg.wide .mark").count() == 0
        log.event("rollback", 26, reason="loss spike", checkpoint=20)
        log.event("sample", 30, prompt="def main(", greedy="self):\n    <b>pass</b>", sampled="argv):")
        log.event("release", 30, folder="releases/step-00000030")
        samples = page.locator("#section-samples")
        expect(samples).to_contain_text("self):\n    <b>pass</b>", use_inner_text=True, timeout=_WAIT_MS)
        expect(samples).to_contain_text("def main(")
        marks = page.locator("svg.wide .mark")
        expect(marks.locator("text")).to_have_text(["release", "rollback"])
        marks.locator("circle").last.hover()
        expect(page.locator("#tip")).to_have_text("rollback at step 26: loss spike; checkpoint 20")
        expect(page.locator("#section-events")).not_to_contain_text("<b>pass")
        log.event("sample", 60, prompt="def main(", greedy="later", sampled="later still")
        expect(samples).to_contain_text("later still", timeout=_WAIT_MS)
        keep_screenshot(page, "watch-samples", full_page=True)


@pytest.mark.slow
def test_picker_shows_another_run_and_the_differences_of_recipes(tmp_path: Path) -> None:
    for name, change in (("one", 0.0), ("two", 0.2)):
        run, log = new_run(tmp_path, name)
        write_steps(log, 1, 30, change=change)
        fields = yaml.safe_load(run.recipe_path.read_text())
        fields["train"]["optimizer"]["learning_rate"] = 0.004 + change
        run.recipe_path.write_text(yaml.safe_dump(fields))
    with watched(tmp_path, "runs/two") as address, opened(address, size=PHONE) as seen:
        page = seen.page
        assert page.locator("h1").inner_text().startswith("two")
        assert page.locator("#section-comparison").count() == 0
        page.locator("#compare summary").click()
        page.locator("#compare input[value=one]").check()
        comparison = page.locator("#section-comparison")
        expect(comparison).to_contain_text("0.004")
        expect(comparison).to_contain_text("train.optimizer.learning_rate")
        new_run(tmp_path, "three")
        picker = page.locator("#picker select")
        expect(picker.locator("option")).to_have_count(3, timeout=_WAIT_MS)
        picker.select_option("one")
        expect(page.locator("h1")).to_contain_text("one")
        assert page.evaluate("document.scrollingElement.scrollWidth") == PHONE[0]


@pytest.mark.slow
def test_saved_page_is_the_report(tmp_path: Path, log: RunLog) -> None:
    write_steps(log, 1, 30)
    saved = tmp_path / "saved.html"
    with watched(tmp_path, "runs/small") as address, opened(address) as seen:
        expect(seen.page.locator("footer")).not_to_contain_text("self-contained")
        with seen.page.expect_download() as download:
            seen.page.locator("#save").click()
        assert download.value.suggested_filename == "small.html"
        download.value.save_as(saved)
    report = write_report(log.run.path).read_text()
    assert "This file is self-contained." in report
    times = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d")
    expected = times.sub("", report).replace(str(log.run.path), "")
    assert times.sub("", saved.read_text()).replace(str(log.run.path), "") == expected
    with opened(saved) as seen:
        seen.page.wait_for_timeout(2000)
        assert seen.requests == [saved.as_uri()]


@pytest.mark.slow
def test_page_shows_that_the_server_has_ended(tmp_path: Path, log: RunLog) -> None:
    write_steps(log, 1, 30)
    with ExitStack() as browsers:
        with watched(tmp_path, "runs/small") as address:
            seen = browsers.enter_context(opened(address))
            expect(seen.page.locator("#connection")).to_have_text("live")
        expect(seen.page.locator("#connection")).to_contain_text("not updated", timeout=_WAIT_MS)
        assert seen.page.locator("#chart-loss").count() == 1


def test_only_new_rows_are_read_and_a_resumed_run_is_read_again(log: RunLog) -> None:
    run = log.run
    reader = MetricsReader(run)
    assert read_run(run.path, reader).metrics.step == 0
    write_steps(log, 1, 25)
    assert read_run(run.path, reader).metrics.step == 25
    first = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(b"x" + first[1:])  # rows that were read are not read again
    write_steps(log, 26, 27)
    assert read_run(run.path, reader).metrics.step == 27
    run.metrics_path.write_bytes(first)
    write_resume(log, 20)
    write_steps(log, 21, 40, change=0.5)
    metrics = read_run(run.path, reader).metrics
    assert (metrics.step, len(metrics.curves["loss"])) == (40, 40)
    assert metrics.newest["loss"] == (40, 1 + 8 / 40 + 0.5)
    assert metrics.curves["loss"].mean[20] == 1 + 8 / 21 + 0.5


def test_unreadable_run_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("one", "broken"):
        run, log = new_run(tmp_path, name)
        write_steps(log, 1, 3)
    run.metrics_path.write_text("no row\n")
    page = LivePage([RunDir(tmp_path / "runs/one")])
    html = page.render("run=one&compare=broken")
    assert 'id="section-loss"' in html and "metrics.jsonl:1: " in html
    html = page.render("run=broken&compare=one")
    assert 'id="section-loss"' not in html and "metrics.jsonl:1: " in html and '<option value="one">' in html
    assert "no run of this name" in page.render("run=..%2Fother")


def test_wrong_arguments_are_errors(
    tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        used = str(other.getsockname()[1])
        for arguments, words in (
            (["nowhere"], "nowhere: no run here"),
            ([], "runs: no run here"),
            (["small", "--port", "0"], "--port 0: "),
            (["small", "--port", "65536"], "--port 65536: "),
            (["small", "--port", used], f"--port {used}: "),
        ):
            monkeypatch.chdir(tmp_path / "runs")
            assert main(["watch", *arguments, "--no-browser"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert words in line


def test_newest_run_is_watched_by_default(tmp_path: Path) -> None:
    for name in ("older", "newer"):
        _, log = new_run(tmp_path, name)
        write_steps(log, 1, 3)
        time.sleep(0.02)
    with watched(tmp_path) as address, urlopen(address) as answer:
        assert "<h1>newer " in answer.read().decode()
        assert "script-src 'sha256-" in answer.headers["Content-Security-Policy"]


def test_page_is_served_while_the_browser_is_open(tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(log, 1, 3)
    (tmp_path / "browser").write_text("#!/bin/sh\ntouch opened\nsleep 20\n")
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{tmp_path / 'browser'} %s")
    with watched(tmp_path, browser=True) as address, urlopen(address, timeout=10) as answer:
        assert "<h1>small " in answer.read().decode()
        for _ in range(100):
            if (tmp_path / "opened").exists():
                break
            time.sleep(0.1)
        else:
            pytest.fail("the browser was not started")


def test_page_is_served_to_this_machine_only(tmp_path: Path, log: RunLog) -> None:
    write_steps(log, 1, 3)
    with watched(tmp_path) as address:
        port = int(address.rpartition(":")[2].strip("/"))
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
            pass
