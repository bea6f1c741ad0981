"""Sources of a recipe from surveyed files: as few as a person would write, each with one glob.

Per folder, prose and code are one source each, and rows are one source per format and field. A glob names the endings
of a source's files, and the names of files without an ending. It matches no file of another source, and no file at
which `prepare` would stop.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath

from tinyllama.drafting.file_names import is_known_text
from tinyllama.drafting.survey import Format, FoundFile, SkippedFile, Survey, skipped_lines
from tinyllama.errors import InputError
from tinyllama.prepare.sources import COMPRESSIONS, check_sources_disjoint, is_read, list_files, split_suffixes
from tinyllama.recipe import Source

_MIN_CODE_SHARE = 0.02
"""Code, or prose, with a smaller share of a folder's text is part of the folder's other source."""
_MIN_SOURCE_SHARE, _MIN_SOURCE_BYTES = 0.002, 100_000
"""A source with less text than this share of all text, and than this size, is not used."""
_MIN_ENDING_SHARE = 0.01
"""Text files with an unknown ending and a smaller share of a folder's text are not used."""
_MAX_PARTS = 8  # sources for the files of one kind in one folder
_MAX_NAMES = 30  # of files without an ending in one glob
_LONG_TEXT_BYTES = 128 << 20  # a document of more than 256 MiB would be rejected
_NEUTRAL_REASONS = ("empty", "link to another file")  # of skipped files, for the choice of endings
_ENDING = re.compile(r"(\.[A-Za-z0-9_+~-]+)+")
_WILDCARDS = re.compile(r"[][*?{},]")


@dataclass(frozen=True)
class DraftSource:
    """A source of the recipe, with the files that it reads."""

    name: str
    path: str
    """Glob, folder or file."""
    files: tuple[FoundFile, ...]

    @property
    def format(self) -> Format:
        """Format of all its files."""
        return self.files[0].format

    @property
    def field(self) -> str | None:
        """Field or column with the text; None for the format `text`."""
        return self.files[0].field

    @property
    def other_fields(self) -> tuple[str, ...]:
        """Other fields or columns with text, which are not used."""
        return self.files[0].other_fields

    @property
    def text_bytes(self) -> float:
        """Estimated size of its text in bytes."""
        return sum(file.text_bytes for file in self.files)

    @property
    def num_documents(self) -> float:
        """Estimated number of its documents."""
        return sum(file.num_documents for file in self.files)

    @property
    def separator(self) -> str | None:
        """Separator of documents: a text file of more than 128 MiB is split at blank lines."""
        is_long = self.format == "text" and any(file.text_bytes > _LONG_TEXT_BYTES for file in self.files)
        return "\n\n" if is_long else None

    def as_source(self) -> Source:
        """Return the source as a recipe has it."""
        return Source(format=self.format, path=self.path, weight=1, text=self.field, separator=self.separator)


def draft_sources(surveys: Sequence[Survey]) -> tuple[list[DraftSource], list[SkippedFile]]:
    """Return the sources for surveyed files, the largest first, and the files that no source uses.

    Raises InputError if there is no file with text, or if no glob separates the files from a file at which `prepare`
    would stop. Raises InputError also if `prepare` would refuse the sources, for example because of two copies of a
    file.
    """
    skipped = [file for one in surveys for file in one.skipped]
    drafts = [draft for one in surveys for draft in _draft_folder(one, skipped)]
    if not drafts:
        reasons = f" ({'; '.join(skipped_lines(skipped))})" if skipped else ", because there is no file"
        paths = " ".join(one.root or "." for one in surveys)
        raise InputError(f"{paths}: no file with text{reasons}; give other files")
    drafts.sort(key=lambda draft: (-draft.text_bytes, draft.path))
    least = min(_MIN_SOURCE_BYTES, _MIN_SOURCE_SHARE * sum(draft.text_bytes for draft in drafts))
    kept = [draft for draft in drafts if draft.text_bytes >= least]
    dropped = (file for draft in drafts if draft.text_bytes < least for file in draft.files)
    skipped += [SkippedFile(file.path, "little text compared with the rest") for file in dropped]
    named: dict[str, DraftSource] = {}
    for draft in kept:
        name = free_name(draft.name, named.__contains__)
        named[name] = replace(draft, name=name)
    sources = {name: draft.as_source() for name, draft in named.items()}
    check_sources_disjoint(sources, {name: list_files(name, source) for name, source in sources.items()})
    return list(named.values()), skipped


def _draft_folder(survey: Survey, skipped: list[SkippedFile]) -> list[DraftSource]:
    texts = _without_rare_names(survey, skipped)
    all_text, code = sum(file.text_bytes for file in texts), sum(file.text_bytes for file in texts if file.is_code)
    has_both = min(code, all_text - code) >= _MIN_CODE_SHARE * all_text
    groups: dict[tuple[Format, str | None, str], list[FoundFile]] = defaultdict(list)
    for file in texts:
        groups["text", None, "code" if has_both and file.is_code else ""].append(file)
    for file in survey.found:
        is_foreign = file.format != "text" and not is_read(file.path, file.format)
        if file.format != "text":  # only a path that names a file reads it whatever its ending
            groups[file.format, file.field, file.saved_dataset or (file.path if is_foreign else "")].append(file)
    refused = {file.path: file.reason for file in survey.skipped if file.is_refused}
    drafts = []
    for (format, field, part), files in groups.items():
        own = {file.path for file in files}
        others = refused | {file.path: "text of another source" for file in survey.found if file.path not in own}
        parts = [(part, files)] if files[0].saved_dataset else cover(survey, files, others)
        kind = Path(part).stem or ("" if format == "text" else field or format)
        name = _source_name(_base_name(survey), kind if len(groups) > 1 else "")
        drafts += [_with_hub_format(DraftSource(name, path, tuple(covered))) for path, covered in parts]
    return drafts


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """Return a name that is not taken: `name`, or else the first of NAME-2, NAME-3 and so on."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if not is_taken(one))


def _base_name(survey: Survey) -> str:
    """Return the name of a surveyed folder, or of the surveyed file if there is only one."""
    if not survey.is_folder and len(survey.found) == 1:
        return split_suffixes(Path(survey.found[0].path).name)[0]
    return Path(survey.root).absolute().name


def _source_name(*parts: str) -> str:
    """Return the parts as one name of a source, which has only ASCII letters, digits, `_` and `-`."""
    words = (re.sub(r"[^A-Za-z0-9_]+", "-", part).strip("-_") for part in parts)
    return "-".join(filter(None, words)) or "text"


def _without_rare_names(survey: Survey, skipped: list[SkippedFile]) -> list[FoundFile]:
    """Return the text files, except those with an unknown ending that is rare, or that mostly other files have."""
    texts = [file for file in survey.found if file.format == "text"]
    if not survey.is_folder:
        return texts
    others = Counter(_pattern_of(file.path) for file in survey.skipped if file.reason not in _NEUTRAL_REASONS)
    groups: dict[str, list[FoundFile]] = defaultdict(list)
    for file in texts:
        groups[_pattern_of(file.path)].append(file)
    sizes = {pattern: sum(file.text_bytes for file in files) for pattern, files in groups.items()}
    largest = sorted((pattern for pattern in sizes if pattern[0] != "*"), key=lambda name: -sizes[name])
    kept = []
    for pattern, files in groups.items():
        is_rare = not is_known_text(files[0].path) and sizes[pattern] < _MIN_ENDING_SHARE * sum(sizes.values())
        if not is_known_text(files[0].path) and len(files) < others[pattern]:
            skipped += [SkippedFile(file.path, "text, but most files with this ending are not") for file in files]
        elif is_rare or pattern in largest[_MAX_NAMES:]:
            skipped += [SkippedFile(file.path, "little text compared with the rest") for file in files]
        else:
            kept += files
    return kept


def cover(
    survey: Survey, files: Sequence[FoundFile], others: Mapping[str, str]
) -> list[tuple[str, Sequence[FoundFile]]]:
    """Return paths, each with its files, that together name all `files` and none of `others`.

    `others` has the reason for each path. The first path is a glob of the endings that none of `others` has. Files with
    other endings follow: in one glob if they are in other subfolders than `others`, else by their names, with one path
    per folder. Raises InputError if these paths are more than _MAX_PARTS.
    """
    patterns = {_pattern_of(file.path) for file in files}
    rivals = [path for path in others if _pattern_of(path) in patterns]
    shared = {_pattern_of(path) for path in rivals} if survey.is_folder else patterns
    separate = [file for file in files if _pattern_of(file.path) not in shared]
    rest = [file for file in files if _pattern_of(file.path) in shared]
    parts: list[tuple[str, Sequence[FoundFile]]] = []
    if separate:
        parts.append((_join(survey.root, "**", braces(patterns - shared)), separate))
    tops = {_top_folder(survey, file.path) for file in rest}
    if rest and survey.is_folder and not tops & {"", *(_top_folder(survey, path) for path in rivals)}:
        parts.append((_join(survey.root, braces(set(map(escape, tops))), "**", braces(shared)), rest))
    else:
        folders: dict[str, list[FoundFile]] = defaultdict(list)
        for file in rest:
            folders[file.path.rpartition("/")[0]].append(file)
        parts += [
            (_join(folder, braces({escape(PurePosixPath(file.path).name) for file in own})), own)
            for folder, own in folders.items()
        ]
    if len(parts) > _MAX_PARTS:
        raise InputError(
            f"{rivals[0]}: {others[rivals[0]]}, and no short glob separates this file from {rest[0].path} and others; "
            "remove or rename the file, or move it out of the folder"
        )
    return [(own[0].path if len(own) == 1 else path, own) for path, own in parts]


def _top_folder(survey: Survey, path: str) -> str:
    """Return the first folder of a path below the surveyed folder; empty if the file is in the folder itself."""
    return path[len(survey.root) :].strip("/").rpartition("/")[0].split("/")[0]


def _pattern_of(path: str) -> str:
    """Return the pattern for files like this one: `*.md` or `*.md.gz`, or the name of a file without an ending."""
    name = PurePosixPath(path).name
    suffixes = PurePosixPath(name).suffixes
    count = 2 if suffixes and suffixes[-1].lower() in COMPRESSIONS else 1
    ending = "".join(suffixes[-count:])
    return f"*{ending}" if len(suffixes) >= count and _ENDING.fullmatch(ending) else escape(name)


def escape(name: str) -> str:
    """Return a pattern for a name: characters that are special in globs become `?`, which matches any character."""
    return _WILDCARDS.sub("?", name)


def braces(patterns: Collection[str]) -> str:
    """Return one glob for patterns of names and endings, such as `*.{md,txt}` or `{*.md,README}`."""
    plain = sorted(set(patterns))
    if len(plain) == 1:
        return plain[0]
    if all(pattern.startswith("*.") for pattern in plain):
        return f"*.{{{','.join(pattern[2:] for pattern in plain)}}}"
    return f"{{{','.join(plain)}}}"


def _join(folder: str, *patterns: str) -> str:
    escaped = escape(folder.rstrip("/"))
    return "/".join([*([escaped] if folder else []), *patterns])


def _with_hub_format(draft: DraftSource) -> DraftSource:
    """Return a source of rows in the format `huggingface`, if names of its files are those of splits."""
    if draft.format == "text" or draft.files[0].saved_dataset:
        return draft
    counts = Counter[str]()
    try:
        files = list_files(draft.name, Source(format="huggingface", path=draft.path, weight=1), counts)
    except InputError:  # only files of a test split, or with different endings
        return draft
    kept = {file.path for file in files}
    if not counts["test split"] and all(file.split == "train" for file in files):
        return draft
    own = (replace(file, format="huggingface") for file in draft.files if file.path in kept)
    return replace(draft, files=tuple(own))
