"""The documentation's site: built strictly, read without a network, and made of what it says it is made of."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.docs.blocks import ROOT
from tools import recipe_page

from tinyllama.recipe import Recipe

REPOSITORY = "https://example.org/owner/tinyllama"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""A network that answers nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a link or an anchor that leads nowhere ends the build."""
    folder = tmp_path_factory.mktemp("site")
    variables = os.environ | PROXIES | {"REPOSITORY_URL": REPOSITORY, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    return folder


def pages(site: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(site.glob("*.html")) if path.name != "404.html"}


def test_every_page_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages(site).keys()
    assert not [name for name in pages(site) if f'href="{name}"' not in index and name != "index.html"]


def test_no_page_asks_another_machine_for_anything(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)[^>]*>"
    )
    for name, text in pages(site).items():
        for match in loaded.finditer(text):
            is_address = 'rel="canonical"' in match[0] or 'rel="edit"' in match[0]
            assert is_address or not urlsplit(match[1] or match[2]).netloc, (name, match[0])
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(\"?https?:", path.read_text())]


def test_links_between_the_roots_pages_and_the_others_lead_somewhere(site: Path) -> None:
    """The build checks links of Markdown; these were led elsewhere by the hook, or are HTML."""
    texts = pages(site)
    for name, text in texts.items():
        for target in re.findall(r'<a [^>]*href="([^"]+)"', text):
            parts = urlsplit(target)
            if parts.netloc or not parts.path:
                continue
            assert (site / unquote(parts.path)).exists(), (name, target)
            other = texts.get(parts.path)
            assert not parts.fragment or other is None or f'id="{unquote(parts.fragment)}"' in other, (name, target)


def test_edit_links_and_links_to_files_lead_to_files_of_the_repository(site: Path) -> None:
    found = set()
    for name, text in pages(site).items():
        for kind, path in re.findall(rf'href="{REPOSITORY}/(edit|blob)/main/([^"#]+)', text):
            assert (ROOT / path).exists(), (name, path)
            found.add((kind, path))
    assert {
        ("edit", "docs/data.md"),
        ("edit", "CONTRIBUTING.md"),
        ("edit", "src/tinyllama/recipe/__init__.py"),
    } <= found
    assert ("blob", "src/tinyllama/recipes/demo.yaml") in found


def test_the_recipes_page_is_what_the_models_say() -> None:
    assert recipe_page.PAGE.read_text() == recipe_page.page(), "docs/recipe.md is out of date: make docs"


def test_the_recipes_page_has_every_field_with_its_sentence() -> None:
    text = recipe_page.page()
    for path, model in recipe_page.parts(Recipe):
        for name, field in model.model_fields.items():
            assert field.description, f"{path}.{name} says nothing"
            assert f"| `{name}` |" in text
    assert "`adamw` or `muon`" in text
    assert "| `every_steps` | integer > 0, in steps | `1000` |" in text


def test_the_search_finds_a_field_of_the_recipe(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert any("watchdog_seconds" in entry["text"] for entry in entries if entry["location"].startswith("recipe.html"))


def test_what_to_cite_names_this_version_and_has_what_the_format_asks_for() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert work["authors"]
        assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in work["authors"])
    assert all({"type", "title", "authors"} <= work.keys() for work in citation["references"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "scheme", "size"),
    [
        ("index", "light", DESKTOP),
        ("recipe", "dark", DESKTOP),
        ("own-data", "light", PHONE),
        ("design", "light", PHONE),
    ],
)
def test_a_page_reads_in_light_and_dark_and_on_a_phone(
    address: str, name: str, scheme: Literal["light", "dark"], size: tuple[int, int]
) -> None:
    with opened(f"{address}/{name}.html", scheme, size) as seen:
        seen.page.wait_for_timeout(300)
        keep_screenshot(seen.page, f"docs-{name}-{scheme}")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0], "wider than the screen"
        assert seen.page.locator("h1").first.is_visible()
        if name == "design":  # both diagrams are drawn
            seen.page.locator("div.mermaid").nth(1).wait_for(timeout=60_000)
            assert seen.page.locator("pre.mermaid").count() == 0
        if size == DESKTOP:
            seen.page.locator("input.md-search__input").click()
            seen.page.keyboard.type("deviations", delay=30)
            seen.page.locator("a.md-search-result__link").first.wait_for(timeout=60_000)
            keep_screenshot(seen.page, f"docs-search-{scheme}")
        assert not seen.external_requests()


def test_a_page_opens_from_the_disk(site: Path) -> None:
    with opened(site / "recipe.html") as seen:
        assert seen.page.locator("h1").first.is_visible()
        assert not seen.external_requests()
