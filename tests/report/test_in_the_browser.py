"""The report in a browser (Debian's chromium): light and dark, on a desktop, on a phone and on paper."""

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.image import imread
from playwright.sync_api import Page
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.report.conftest import change_jsonl

from tinyllama.report.page import write_report
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

_A4_WITHOUT_MARGINS = (688, 1009)
"""Width and height in CSS pixels."""

Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a comparison, samples and marks of every category."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("seen") / "small"))
    more = [("signal", 20), ("resume", 20), ("rollback", 33), ("tracker-failed", 35)]
    change_jsonl(
        run / "events.jsonl",
        lambda rows: rows + [{"time": rows[-1]["time"], "event": name, "step": step} for name, step in more],
    )
    log = RunLog(RunDir(run))
    for step in range(0, 40, 4):
        log.event("sample", step, prompt="def main(argv", greedy="x" * 90, sampled=f" | None) ->\n    <i>{step}</i>")
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | {"mfu": 0.5 + row["step"] / 200} for row in rows])
    return write_report(run, [trained])


def visible_plots(page: Page) -> Iterator[dict[str, float]]:
    for plot in page.locator("svg.drawing").all():
        if box := plot.bounding_box():
            yield {"width": box["width"], "height": box["height"], "lines": plot.locator(".linear .line").count()}


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_loads_alone_and_fits_the_screen(report: Path, scheme: Scheme, size: tuple[int, int]) -> None:
    with opened(report, scheme, size) as seen:
        page = seen.page
        assert seen.requests == [report.resolve().as_uri()]
        # A phone's innerWidth grows with elements that are too wide for it.
        assert page.evaluate("document.scrollingElement.scrollWidth") == size[0]
        plots = list(visible_plots(page))
        assert len(plots) == 10  # loss, comparison, scores, seven small ones; each in one of its sizes
        assert all(plot["width"] > 250 and plot["height"] > 130 for plot in plots)
        assert all(plot["lines"] >= 1 for plot in plots)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background[4:-1].split(",")))
        assert brightness > 700 if scheme == "light" else brightness < 100
        keep_screenshot(page, f"report-{scheme}-{'desktop' if size == DESKTOP else 'phone'}", full_page=True)


def test_plots_have_contrast_and_hues_in_both_schemes(report: Path) -> None:
    for scheme, background in (("light", 1.0), ("dark", 0.08)):
        with opened(report, scheme) as seen:  # type: ignore[arg-type]
            image = seen.page.locator("#chart-loss svg.wide").screenshot()
        pixels = imread(BytesIO(image))[:, :, :3]
        assert np.median(pixels) == pytest.approx(background, abs=0.03)
        red, green, blue = (pixels[:, :, channel] for channel in range(3))
        assert ((blue - red > 0.3) & (blue > green)).mean() > 1e-3  # training
        assert ((red - blue > 0.5) & (red > green)).mean() > 1e-4  # validation
        assert np.abs(pixels.mean(axis=2) - np.median(pixels)).max() > 0.5  # text


def test_text_in_plots_is_readable_on_a_phone(report: Path) -> None:
    with opened(report, "light", PHONE) as seen:
        heights = [text.bounding_box() for text in seen.page.locator("svg.drawing text").all()]
        assert min(box["height"] for box in heights if box) >= 9


def test_print_is_light_with_complete_plots_and_recipe(report: Path, tmp_path: Path) -> None:
    with opened(report, "dark", _A4_WITHOUT_MARGINS) as seen:
        page = seen.page
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator(".switch").first.is_visible()
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        for figure in page.locator("figure").all():
            box = figure.bounding_box()
            assert box and 100 < box["height"] < _A4_WITHOUT_MARGINS[1]
            assert figure.evaluate("figure => getComputedStyle(figure).breakInside") == "avoid"
        assert page.locator("pre").bounding_box()["height"] > 200  # type: ignore[index]
        keep_screenshot(page, "report-print", full_page=True)
        pdf = page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") in range(3, 12)


def test_samples_are_a_timeline_of_escaped_text(report: Path) -> None:
    with opened(report, size=PHONE) as seen:
        section = seen.page.locator("#section-samples")
        rows = section.locator("tbody tr:visible")
        assert [row.split("\t")[0].strip() for row in rows.locator("td:first-child").all_inner_texts()] == [
            "0", "8", "16", "20", "28", "36",
        ]  # fmt: skip
        assert "->\n    <i>36</i>" in rows.last.inner_text()
        section.locator("summary").click()
        assert section.locator("tbody tr:visible").count() == 16


def test_report_is_complete_without_its_script(report: Path) -> None:
    with opened(report, runs_scripts=False) as seen:
        page = seen.page
        assert len(list(visible_plots(page))) == 10
        line = page.locator("#chart-loss svg.wide .training .line:visible")
        linear = line.get_attribute("d")
        page.locator("#chart-loss .switch input").check()
        assert line.get_attribute("d") != linear
