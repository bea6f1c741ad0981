"""A browser for tests: Debian's chromium, headless, through playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright
from tests.conftest import cannot_run

ARTEFACTS = Path(__file__).parent / "artefacts"
"""Folder of the screenshots, which git ignores and CI keeps."""
DESKTOP, PHONE = (1280, 800), (390, 844)
"""Width and height in CSS pixels."""

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Opened:
    """A page, and the addresses of all its requests so far, failed ones included."""

    page: Page
    requests: list[str]

    def external_requests(self) -> list[str]:
        """Return the requests to other machines, including blocked ones."""
        urls = [(address, urlsplit(address)) for address in self.requests]
        return [
            address
            for address, url in urls
            if url.scheme not in ("file", "data", "blob", "about") and url.hostname not in _LOCAL_HOSTS
        ]


@contextmanager
def opened(
    address: str | Path,
    scheme: Literal["light", "dark"] = "light",
    size: tuple[int, int] = DESKTOP,
    runs_scripts: bool = True,
) -> Iterator[Opened]:
    """Open a file or an address; requests to other machines are blocked."""
    address = address.resolve().as_uri() if isinstance(address, Path) else address
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        context = browser.new_context(
            color_scheme=scheme,
            viewport={"width": size[0], "height": size[1]},
            is_mobile=size == PHONE,
            has_touch=size == PHONE,
            java_script_enabled=runs_scripts,
        )
        page = context.new_page()
        seen = Opened(page, [])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda socket: seen.requests.append(socket.url))
        page.route(
            lambda url: urlsplit(url).scheme.startswith("http") and urlsplit(url).hostname not in _LOCAL_HOSTS,
            lambda route: route.abort(),
        )
        page.goto(address)
        try:
            yield seen
        finally:
            browser.close()


def keep_screenshot(page: Page, name: str, full_page: bool = False) -> Path:
    """Save a screenshot as `tests/artefacts/NAME.png`: of the viewport, or of the full page."""
    path = ARTEFACTS / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path, full_page=full_page)
    return path


def find_chromium() -> str:
    """Return the browser's path. Without it a test fails in CI and is skipped elsewhere."""
    if path := shutil.which("chromium"):
        return path
    cannot_run("chromium is missing; install it: apt-get install chromium")
