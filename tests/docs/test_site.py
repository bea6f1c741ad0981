"""The documentation site: built strictly, readable without a network, and up to date."""

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
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from tests.browser import DESKTOP, PHONE, keep_screenshot, opened
from tests.docs.blocks import ROOT
from tools import commands_page, recipe_page

import tinyllama
from tinyllama.cli import COMMANDS
from tinyllama.cli.arguments import describe
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


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)|<link\b[^>]*\bhref=\"?([^\" >]+)[^>]*>"
    )
    for name, text in pages(site).items():
        for match in loaded.finditer(text):
            is_address = 'rel="canonical"' in match[0] or 'rel="edit"' in match[0]
            assert is_address or not urlsplit(match[1] or match[2]).netloc, (name, match[0])
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(\"?https?:", path.read_text())]


def test_internal_links_exist(site: Path) -> None:
    """The build checks links in Markdown; the hook changes links, and some links are HTML."""
    texts = pages(site)
    for name, text in texts.items():
        for target in re.findall(r'<a [^>]*href="([^"]+)"', text):
            parts = urlsplit(target)
            if parts.netloc or not parts.path:
                continue
            assert (site / unquote(parts.path)).exists(), (name, target)
            other = texts.get(parts.path)
            assert not parts.fragment or other is None or f'id="{unquote(parts.fragment)}"' in other, (name, target)


def test_links_to_the_repository_name_existing_files(site: Path) -> None:
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


def test_header_has_the_version_and_the_repository(site: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, text in pages(site).items():
        header = text.partition("<header")[2].partition("</header>")[0]
        assert f"tinyllama {version}" in header, name
        assert re.search(rf'<a href="?{re.escape(REPOSITORY)}"? [^>]*class="?md-source', header), name
        assert "data-md-component=source" not in text.replace('"', ""), name  # it requests the repository's statistics


@pytest.mark.parametrize("generator", [recipe_page, commands_page], ids=["recipe", "commands"])
def test_generated_page_is_up_to_date(generator: Any) -> None:
    assert generator.PAGE.read_text() == generator.page(), f"{generator.PAGE.name} is out of date: make docs"


def test_commands_page_describes_every_command_and_option() -> None:
    sections = dict(re.findall(r"^## `tinyllama ([a-z ]+)`\n(.*?)(?=^##|\Z)", commands_page.page(), re.M | re.S))
    assert sections.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        options = [argument.name for argument in describe(name, command).arguments]
        assert not [option for option in options if f"| `{option}" not in sections[name]], name


def test_recipe_page_describes_every_field() -> None:
    text = recipe_page.page()
    for path, model in recipe_page.parts(Recipe):
        for name, field in model.model_fields.items():
            assert field.description, f"{path}.{name} has no description"
            assert f"| `{name}` |" in text
    assert "`adamw` or `muon`" in text
    assert "| `every_steps` | integer > 0, in steps | `1000` |" in text


def test_python_reference_has_every_public_name(site: Path) -> None:
    text = (site / "python.html").read_text()
    assert not [name for name in tinyllama.__all__ if f'id="tinyllama.{name}"' not in text]


def test_search_index_has_the_recipe_fields(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert any("watchdog_seconds" in entry["text"] for entry in entries if entry["location"].startswith("recipe.html"))


def test_citation_names_the_projects_version_and_license() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    for work in (citation, *citation["references"]):
        assert work["title"]
        assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in work["authors"])


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
def test_page_is_readable_in_both_schemes_and_on_a_phone(
    address: str, name: str, scheme: Literal["light", "dark"], size: tuple[int, int]
) -> None:
    with opened(f"{address}/{name}.html", scheme, size) as seen:
        seen.page.wait_for_timeout(300)
        keep_screenshot(seen.page, f"docs-{name}-{scheme}")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0], "wider than the screen"
        assert seen.page.locator("h1").first.is_visible()
        blocks = seen.page.locator(".highlight pre > code")
        hidden = blocks.evaluate_all(
            "all => all.filter(code => code.scrollWidth > code.clientWidth)"
            ".map(code => [code.closest('.highlight').className, getComputedStyle(code).backgroundAttachment])"
        )
        shadows = "local, local, scroll, scroll, scroll"
        assert {tuple(found) for found in hidden} <= {("language-text highlight", shadows)}
        if name == "design":  # both diagrams are drawn
            seen.page.locator("div.mermaid").nth(1).wait_for(timeout=60_000)
            assert seen.page.locator("pre.mermaid").count() == 0
        if size == DESKTOP:
            seen.page.locator("input.md-search__input").click()
            seen.page.keyboard.type("deviations", delay=30)
            seen.page.locator("a.md-search-result__link").first.wait_for(timeout=60_000)
            keep_screenshot(seen.page, f"docs-search-{scheme}")
        assert not seen.external_requests()
