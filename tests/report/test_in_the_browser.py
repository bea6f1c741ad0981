"""The report as people see it: in Debian's chromium, light and dark, at a desk, on a phone and on paper."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Page
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.report.conftest import change_jsonl

from tinyllama.report import report

pytestmark = pytest.mark.slow

_A4_INSIDE = (688, 1009)
"""CSS pixels between the margins."""


@pytest.fixture(scope="module")
def written(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a comparison and marks of every kind."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("seen") / "small"))
    more = [("signal", 20), ("resume", 20), ("rollback", 33), ("tracker-failed", 35)]
    change_jsonl(
        run / "events.jsonl",
        lambda rows: rows + [{"time": rows[-1]["time"], "event": name, "step": step} for name, step in more],
    )
    change_jsonl(run / "metrics.jsonl", lambda rows: [row | {"mfu": 0.5 + row["step"] / 200} for row in rows])
    return report(run, [trained])


@pytest.fixture(params=[("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)], ids=str)
def looks(request: pytest.FixtureRequest) -> tuple[Literal["light", "dark"], tuple[int, int]]:
    found: tuple[Literal["light", "dark"], tuple[int, int]] = request.param
    return found


def visible_drawings(page: Page) -> Iterator[dict[str, float]]:
    for drawing in page.locator(".drawing svg").all():
        box = drawing.bounding_box()
        if box:
            yield {"width": box["width"], "height": box["height"], "marks": drawing.locator("path").count()}


def test_it_opens_alone_fits_the_screen_and_shows_its_pictures(
    written: Path, looks: tuple[Literal["light", "dark"], tuple[int, int]]
) -> None:
    scheme, size = looks
    with opened(written, scheme, size) as seen:
        page = seen.page
        assert seen.requests == [written.resolve().as_uri()]
        # A phone's innerWidth grows with what is too wide for it.
        assert page.evaluate("document.scrollingElement.scrollWidth") == size[0]
        drawings = list(visible_drawings(page))
        assert len(drawings) == 9  # loss, comparison, scores, six small ones; each in one of its sizes
        assert all(drawing["width"] > 250 and drawing["height"] > 130 for drawing in drawings)
        assert all(drawing["marks"] > 8 for drawing in drawings)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background[4:-1].split(",")))
        assert brightness > 700 if scheme == "light" else brightness < 100
        width = "desktop" if size == DESKTOP else "phone"
        keep_screenshot(page, f"report-{scheme}-{width}", whole=True)


def test_the_curves_take_the_colours_of_the_scheme(written: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        with opened(written, scheme) as seen:
            colours[scheme] = seen.page.evaluate(
                "[...document.querySelectorAll('#section-loss .wide path')].map(path => getComputedStyle(path).stroke)"
            )
    assert "rgb(42, 111, 187)" in colours["light"] and "rgb(106, 168, 240)" in colours["dark"]
    assert not {"rgb(42, 111, 187)", "rgb(51, 51, 51)"} & set(colours["dark"])


def test_text_in_pictures_is_readable_on_a_phone(written: Path) -> None:
    with opened(written, "light", PHONE) as seen:
        heights = [text.bounding_box() for text in seen.page.locator(".drawing svg text").all()]
        assert min(box["height"] for box in heights if box) >= 9


def test_on_paper_it_is_light_with_whole_pictures_and_the_recipe(written: Path, tmp_path: Path) -> None:
    with opened(written, "dark", _A4_INSIDE) as seen:
        page = seen.page
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        for figure in page.locator("figure").all():
            box = figure.bounding_box()
            assert box and 100 < box["height"] < _A4_INSIDE[1]
            assert figure.evaluate("figure => getComputedStyle(figure).breakInside") == "avoid"
        assert page.locator("pre").bounding_box()["height"] > 200  # type: ignore[index]
        keep_screenshot(page, "report-print", whole=True)
        pdf = page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") in range(3, 12)
