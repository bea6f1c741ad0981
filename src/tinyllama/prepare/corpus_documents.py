"""What becomes of the embedded corpus's files: documents of code and documents of prose.

Files come in the order of their SHA-256 until a part is full: a fair sample, the same for the same packages. Code
goes first; from the Python files that are left, prose takes the docstrings and comments. Each line of code and
each paragraph is wanted once: half of a file's lines seen before make it a near-duplicate, and so do the first
and last eight words of a paragraph.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics
from typing import NamedTuple

from tinyllama.prepare.corpus_files import SourceFile
from tinyllama.prepare.corpus_text import (
    code_reject_reason,
    documentation,
    edges,
    is_cpp,
    paragraphs,
    strip_repeated_license,
    word_ngrams,
)

LANGUAGES = {
    ".py": "python", ".c": "c", ".h": "c", ".hpp": "cpp", ".cpp": "cpp", ".cc": "cpp", ".cu": "cuda", ".cuh": "cuda",
    ".pyx": "cython", ".pxd": "cython", ".pxi": "cython", ".js": "javascript", ".css": "css", ".html": "html",
    ".yaml": "yaml", ".cmake": "cmake", ".sh": "shell", ".f": "fortran", ".f90": "fortran", ".xsl": "xslt",
    ".proto": "protocol-buffer", ".bat": "batchfile", ".ps1": "powershell", ".lua": "lua", ".r": "r",
}  # fmt: skip
DOCUMENTED_SUFFIXES = (".py", ".pyi", ".pyx")
PAGE_SUFFIXES = (".md", ".rst", ".txt")
SUFFIXES = frozenset({*LANGUAGES, *DOCUMENTED_SUFFIXES, *PAGE_SUFFIXES})
# Each kind of prose goes to the set of SlimPajama that is most like it.
GITHUB = "RedPajamaGithub"  # whole source files
DOCUMENTATION = "RedPajamaC4"  # docstrings and comments, a document a module
PAGES = "RedPajamaCommonCrawl"  # the distributions' pages on the package index, other text files
TOPICS = "RedPajamaWikipedia"  # the language reference that `help()` shows
MB = 1_000_000
LIMITS_BYTES = {"python": 18 * MB, "cpp": 6 * MB, "c": 3 * MB, GITHUB: 3 * MB, DOCUMENTATION: 16 * MB}
OTHER_LIMIT_BYTES = 3 * MB // 2
MIN_PROSE_CHARACTERS = 200


class Document(NamedTuple):
    """One row: its `part` is a set of SlimPajama or a language of Starcoderdata; `name` is the path of code."""

    part: str
    text: str
    repository: str = ""
    name: str = ""


def is_quota_reached(part: str, num_bytes: Counter[str]) -> bool:
    """Whether a part has its share of the corpus."""
    return num_bytes[part] >= LIMITS_BYTES.get(part, OTHER_LIMIT_BYTES)


def code_documents(files: list[SourceFile], left_out: Counter[str]) -> Iterator[Document]:
    """Yield whole source files: SlimPajama's GitHub share first, then those of each language until it is full."""
    num_bytes: Counter[str] = Counter()
    known_lines: set[str] = set()
    known_heads: set[str] = set()
    for file in files:
        if file.path.suffix not in LANGUAGES:
            continue
        text = file.read()
        part = part_of_code(file.path.suffix, text, num_bytes)
        if flaw := "part full" if is_quota_reached(part, num_bytes) else code_reject_reason(text):
            left_out[f"code: {flaw}"] += 1
            continue
        text = strip_repeated_license(text, known_heads)
        lines = {line for line in map(str.strip, text.split("\n")) if len(line) >= 20}
        if 2 * len(lines - known_lines) <= len(lines):
            left_out["code: near-duplicate"] += 1
            continue
        known_lines |= lines
        num_bytes[part] += len(text)
        yield Document(part, text, file.repository, file.name)


def part_of_code(suffix: str, text: str, num_bytes: Counter[str]) -> str:
    """Where a source file belongs: to the GitHub share until that is full, then to its language."""
    if not is_quota_reached(GITHUB, num_bytes):
        return GITHUB
    language = LANGUAGES[suffix]
    return "cpp" if language == "c" and is_cpp(text) else language


def prose_documents(files: list[SourceFile], source_code: list[Document], left_out: Counter[str]) -> Iterator[Document]:
    """Yield documents of paragraphs that stood nowhere before and do not stand in the source code either."""
    used = {(document.repository, document.name) for document in source_code}
    unused = [file for file in files if (file.repository, file.name) not in used]
    drafts = list(iter_prose_candidates(unused, left_out))
    wanted = {phrase for _, draft in drafts for paragraph in draft for phrase in edges(paragraph)}
    in_code = {phrase for document in source_code for phrase in word_ngrams(document.text) if phrase in wanted}
    for part, draft in drafts:
        kept = [paragraph for paragraph in draft if not in_code.issuperset(edges(paragraph))]
        left_out["paragraph: in the code"] += len(draft) - len(kept)
        text = "\n\n".join(kept)
        if len(text) >= MIN_PROSE_CHARACTERS:
            yield Document(part, text)
        else:
            left_out["prose: too little"] += 1


def iter_prose_candidates(files: list[SourceFile], left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (part, new paragraphs) of each text until its part is full."""
    num_bytes: Counter[str] = Counter()
    known_edges = set()
    for part, passages in prose_passages(files):
        if is_quota_reached(part, num_bytes):
            left_out["prose: part full"] += 1
            continue
        draft = []
        for paragraph in (paragraph for passage in passages for paragraph in paragraphs(passage)):
            if edges(paragraph) in known_edges:
                left_out["paragraph: repeated"] += 1
            else:
                known_edges.add(edges(paragraph))
                draft.append(paragraph)
        num_bytes[part] += sum(map(len, draft))
        yield part, draft


def prose_passages(files: list[SourceFile]) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield (part, texts with their markup) of pydoc's topics and of each file that says something in words."""
    for topic in sorted(topics):
        yield TOPICS, [topics[topic]]
    for file in files:
        if file.path.name == "METADATA":
            yield PAGES, [file.read().partition("\n\n")[2]]
        elif file.path.suffix in PAGE_SUFFIXES:
            yield PAGES, [file.read()]
        elif file.path.suffix in DOCUMENTED_SUFFIXES:
            yield DOCUMENTATION, documentation(file.read())
