"""English text and code from Debian packages, as jsonl.zst in the schema of SlimPajama, for benchmarks/prepare.py.

The English text is the documentation of Linux, Python, PostgreSQL, Perl and Rust. The code is the source of Go 1.19 and
Rust 1.63. `apt-get download` downloads the packages, and `dpkg-deb` unpacks them. Each page or source file is one
document; duplicates are removed. `--text DIR` uses every file under DIR/prose and DIR/code instead.
"""

import hashlib
import html
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
import zstandard

PACKAGES = {
    "prose": {
        "linux-doc-6.1": "*.html",
        "python3.11-doc": "*.html",
        "postgresql-doc-15": "*.html",
        "perl-doc": "*.pod",
        "rust-src": "*.md",
    },
    "code": {"golang-1.19-src": "*.go", "rust-src": "*.rs"},
}
FILES_OF_A_KIND = 8
# the article of a page that Sphinx or DocBook generated, without navigation
ARTICLE = re.compile(
    r'(?:role="main"|class="(?:sect|chapter|refentry)[^"]*")[^>]*>(.*?)'
    r'(?:<div class="(?:rst-footer-buttons|sphinxsidebar|navfooter)|<footer|</body>)',
    re.DOTALL,
)
MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL)
BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")


def make_corpus(work: Path, text: Path | None, megabytes: float) -> Path:
    """Return a folder with prose/*.jsonl.zst and code/*.jsonl.zst, about `megabytes` of UTF-8 each, written once."""
    corpus = work / f"corpus-{megabytes:g}"
    for kind, packages in PACKAGES.items():
        if (corpus / kind).is_dir():
            continue
        if text is None:
            texts = (page for name, pattern in packages.items() for page in read_texts(unpack(work, name), pattern))
        else:
            texts = read_texts(text / kind, "*")
        write_jsonl(corpus / kind, choose(texts, int(megabytes * 1e6)))
    return corpus


def unpack(work: Path, package: str) -> Path:
    """Return the folder of an unpacked Debian package."""
    folder, downloads = work / "unpacked" / package, work / "packages"
    if not folder.is_dir():
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
        (archive,) = downloads.glob(f"{package}_*.deb")
        partial = folder.with_name(f"{folder.name}.part")
        partial.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
        partial.rename(folder)
    return folder


def read_texts(folder: Path, pattern: str) -> Iterator[str]:
    """Yield the text of each UTF-8 file that matches, without translations to other languages."""
    for path in sorted(folder.rglob(pattern)):
        if not path.is_file() or "translations" in path.parts:
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text := page_text(text) if path.suffix == ".html" else text:
            yield text


def page_text(page: str) -> str:
    """Return the article of an HTML page as plain text, or an empty string if the page has no article."""
    article = ARTICLE.search(page)
    return BLANK_LINES.sub("\n\n", html.unescape(MARKUP.sub("", article[1]))).strip() if article else ""


def choose(texts: Iterable[str], num_bytes: int) -> list[str]:
    """Return different documents in a fixed random order, up to `num_bytes` of UTF-8."""
    distinct = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    sizes = [len(text.encode()) for text in distinct]
    total = count = 0
    while count < len(distinct) and total < num_bytes:
        total += sizes[count]
        count += 1
    if total < num_bytes:
        raise SystemExit(f"{total / 1e6:.1f} MB of text found, {num_bytes / 1e6:.1f} MB requested; lower --megabytes")
    return distinct[:count]


def write_jsonl(folder: Path, texts: list[str]) -> None:
    """Write the documents as rows of SlimPajama, in several files of about the same size."""
    random.Random(0).shuffle(texts)
    partial = folder.with_name(f"{folder.name}.part")
    partial.mkdir(parents=True, exist_ok=True)
    for number in range(FILES_OF_A_KIND):
        rows = [
            orjson.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}})
            for text in texts[number::FILES_OF_A_KIND]
        ]
        compressed = zstandard.ZstdCompressor().compress(b"\n".join([*rows, b""]))
        (partial / f"example_train_{number}.jsonl.zst").write_bytes(compressed)
    partial.rename(folder)


def read_jsonl(folder: Path) -> Iterator[str]:
    """Yield the text of each row of a folder's files, in order."""
    for path in sorted(folder.glob("*.jsonl.zst")):
        with zstandard.open(path, "rb") as file:
            yield from (orjson.loads(line)["text"] for line in file.read().splitlines())


def text_bytes(folder: Path) -> int:
    """Return the number of UTF-8 bytes in the documents of a folder."""
    return sum(len(text.encode()) for text in read_jsonl(folder))
