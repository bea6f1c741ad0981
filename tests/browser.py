"""A real browser for tests: Debian's chromium, headless, through playwright.

`opened` gives a page in a colour scheme and a size and the addresses of all that it asked for; `keep_screenshot` leaves
what a person would see in `tests/artefacts/`, which git ignores and CI keeps.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

ARTEFACTS = Path(__file__).parent / "artefacts"
DESKTOP, PHONE = (1280, 800), (390, 844)
"""Width and height in CSS pixels."""

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Opened:
    """A page, and the addresses of all requests that it has made so far, those that failed among them."""

    page: Page
    requests: list[str]

    def from_outside(self) -> list[str]:
        """Requests that went to another machine, or would have."""
        return [
            address
            for address in self.requests
            if urlsplit(address).scheme not in ("file", "data", "blob", "about")
            and urlsplit(address).hostname not in _LOCAL_HOSTS
        ]


@contextmanager
def opened(
    address: str | Path, scheme: Literal["light", "dark"] = "light", size: tuple[int, int] = DESKTOP
) -> Iterator[Opened]:
    """Open a file or an address; nothing from outside this machine is ever answered."""
    where = address.resolve().as_uri() if isinstance(address, Path) else address
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        width, height = size
        context = browser.new_context(
            color_scheme=scheme,
            viewport={"width": width, "height": height},
            is_mobile=size == PHONE,
            has_touch=size == PHONE,
        )
        page = context.new_page()
        seen = Opened(page, [])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda socket: seen.requests.append(socket.url))
        page.route(
            lambda url: urlsplit(url).scheme.startswith("http") and urlsplit(url).hostname not in _LOCAL_HOSTS,
            lambda route: route.abort(),
        )
        page.goto(where)
        try:
            yield seen
        finally:
            browser.close()


def keep_screenshot(page: Page, name: str, whole: bool = False) -> Path:
    """Save what the page looks like as `tests/artefacts/NAME.png`; `whole`, also what one would scroll to."""
    path = ARTEFACTS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=whole)
    return path


def chromium() -> str:
    """Debian's browser. Where it is missing a test fails in CI and is skipped elsewhere."""
    path = shutil.which("chromium")
    if path:
        return path
    missing = "chromium is missing; install it: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
