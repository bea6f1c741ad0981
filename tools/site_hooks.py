"""MkDocs hooks that add pages and adapt links.

CONTRIBUTING.md, CHANGELOG.md and SECURITY.md become pages of the site. A link to one of these files becomes a link to
its page. A link to a file that is not a page leads to the repository, or becomes plain text if no repository is
configured. The header shows the version.
"""

import posixpath
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security-policy.md"}
"""Pages in the repository's root: file name to page name."""
GENERATED_FROM = {
    "recipe.md": "src/tinyllama/recipe/__init__.py",
    "commands.md": "src/tinyllama/cli/__init__.py",
}
"""Generated pages, and the source file of each."""

_FENCED_OR_LINK = re.compile(
    r"^(`{3,}).*?^\1$|(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.MULTILINE | re.DOTALL
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the version to the name of the site, and disable edit links if no repository is configured."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.site_name = f"{config.site_name} {project['version']}"
    if not config.repo_url:
        config.repo_url = config.edit_uri = None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the repository's root."""
    for source, name in ROOT_PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt a page's links to the site, and its edit link to the source file."""
    source = source_of(page.file.src_uri)
    if config.repo_url:
        edited = GENERATED_FROM.get(page.file.src_uri, source)
        page.edit_url = f"{config.repo_url.rstrip('/')}/edit/main/{edited}"
    return adapt_links(markdown, source, config.repo_url or "")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Keep the theme's script from requesting the numbers of stars and forks from the repository's host."""
    return output.replace(' data-md-component="source"', "")


def source_of(page: str) -> str:
    """Return a page's file, relative to the repository's root."""
    return next((source for source, name in ROOT_PAGES.items() if name == page), f"docs/{page}")


def adapt_links(markdown: str, source: str, repository: str) -> str:
    """Return the Markdown of the file `source` with its relative links adapted to the site, except in fenced blocks."""

    def adapt(match: re.Match[str]) -> str:
        fence, image, text, target = match.groups()
        if fence:
            return match[0]
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = ROOT_PAGES.get(wanted) or (wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if place:
            return f"{image}[{text}]({place}{'#' + anchor if anchor else ''})"
        if not (ROOT / wanted).exists():
            return match[0]  # a strict build refuses this broken link
        return f"[{text}]({repository.rstrip('/')}/blob/main/{wanted})" if repository else text

    return _FENCED_OR_LINK.sub(adapt, markdown)
