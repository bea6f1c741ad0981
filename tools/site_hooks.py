"""MkDocs' hooks: what makes the repository's files a site.

Pages of the repository's root (CONTRIBUTING.md and the like) become pages of the site as they are, with their links led
to where the site has them; a link to a file that is no page leads to the repository, or is text where none is named.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security-policy.md"}
"""Files of the root that are pages, and their names on the site."""
GENERATED_FROM = {"recipe.md": "src/tinyllama/recipe/__init__.py"}
"""Pages that are written by a program, and what to edit instead."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """No edit links where no repository is named."""
    if not config.repo_url:
        config.repo_url = config.edit_uri = None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages."""
    for source, name in ROOT_PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links to where the site has what they name, and the edit link to the source."""
    source = source_of(page.file.src_uri)
    if config.repo_url:
        edited = GENERATED_FROM.get(page.file.src_uri, source)
        page.edit_url = f"{config.repo_url.rstrip('/')}/edit/main/{edited}"
    parts = _FENCED.split(markdown)
    parts[::2] = [led(part, source, config.repo_url or "") for part in parts[::2]]
    return "".join(parts)


def source_of(page: str) -> str:
    """A page's file, from the repository's root."""
    return next((source for source, name in ROOT_PAGES.items() if name == page), f"docs/{page}")


def led(markdown: str, source: str, repository: str) -> str:
    """Markdown of the file `source` whose relative links lead to where the site has what they name."""

    def lead(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = ROOT_PAGES.get(wanted) or (wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if place:
            return f"{image}[{text}]({place}{'#' + anchor if anchor else ''})"
        if not (ROOT / wanted).exists():
            return match[0]  # which a strict build refuses
        return f"[{text}]({repository.rstrip('/')}/blob/main/{wanted})" if repository else text

    return _LINK.sub(lead, markdown)
