"""Cleaning of documents: filters, then removal of duplicates and of documents with evaluation items, then masking.

Cleaning stages, such as the search for duplicates, run before any tokens are written. All tasks of a stage finish
before the next stage starts. Cleaning steps then drop documents from the stream of documents that a task writes.
Duplicates are searched among the documents that pass the filters, as in FineWeb. Otherwise, a filter could drop the one
document that is kept of several near-duplicates. The stage that reads the documents for this search saves which of them
the filters drop, so that most filters run only once.
Packages of the extra `clean` are imported only if a recipe needs them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import orjson
from datatrove.data import Document

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, read_json
from tinyllama.prepare import block_lists, decontamination, deduplication, languages
from tinyllama.prepare.block_lists import FINEWEB
from tinyllama.prepare.files import is_remote
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import list_files, url_field
from tinyllama.recipe import Cleaning, Recipe, Source

DropCallback = Callable[[Document], None]
"""Function that is called once per dropped document, with the reason in `metadata["filter_reason"]`."""
Step = Callable[[Iterator[Document]], Iterator[Document]]
KEPT_DOCUMENT = "kept_document"
"""Key in the metadata of a duplicate; the value is the `Place` of the document that is kept."""
MATCHING_ITEMS = "matching_items"
"""Key in the metadata of a contaminated document; the value lists the matching items of each evaluation task."""
URL = "url"
"""Key of a document's address in its metadata."""
Check = Callable[[Document], str | None]
"""Function that returns the reason to drop a document, or None. It may change the document's text."""

_REASON = "filter_reason"
_CHANGES_TEXT = "c4"  # the only filter that changes documents
_MAX_ROWS_WITHOUT_URL = 1000


class CleaningStage(NamedTuple):
    """A cleaning stage, whose tasks must all finish before the next stage starts."""

    name: str
    tasks: int
    run: Callable[[Iterator[Document], int], None]
    """Function that runs task `rank` of the stage, given the documents of the recipe's task `rank`, and `rank`."""


def check_cleaning(recipe: Recipe) -> None:
    """Check the packages, languages, evaluation tasks, block lists and URLs of all sources.

    Raises InputError if a package that a source needs is missing, or if a setting or a file is not valid.
    """
    for name, source in recipe.data.sources.items():
        cleaning, place = source.clean, f"data.sources.{name}.clean"
        _check_packages(cleaning, place)
        decontamination.check_tasks(cleaning.decontaminate, f"{place}.decontaminate")
        languages.check_languages(cleaning.languages, f"{place}.languages")
        if cleaning.filters:
            _check_language(cleaning.language, f"{place}.language")
        block_lists.check_block_lists(cleaning.url_block_lists, f"{place}.url_block_lists")
        _check_urls(name, source)


def _check_packages(cleaning: Cleaning, place: str) -> None:
    has_datatrove_rules = cleaning.filters or cleaning.mask_personal_data or FINEWEB in cleaning.url_block_lists
    for is_needed, package, extra in (
        (has_datatrove_rules, "regex", "clean"),
        (cleaning.languages, "py3langid", "clean"),
        (cleaning.decontaminate, "lm_eval", "evaluate"),
    ):
        if is_needed and find_spec(package) is None:
            raise InputError(f"{place}: needs {package}; pip install 'tinyllama[{extra}]'")


def _check_language(language: str, place: str) -> None:
    from tinyllama.prepare.quality import word_tokenizer  # noqa: PLC0415 - needs the extra `clean`

    try:
        word_tokenizer(language)
    except ValueError:
        raise InputError(f"{place}: no word-splitting rules for {language!r}; set an ISO 639-1 code like en") from None
    except ImportError as error:
        # datatrove writes: Please install `spacy` to use zh word tokenizer (`pip install spacy`).
        command = re.search(r"`pip install (.+?)`", str(error))
        package = command[1] if command else error.name
        raise InputError(f"{place}: {language} needs {package}; pip install {package}") from None


def _check_urls(name: str, source: Source) -> None:
    """Raise InputError if none of the first rows of a local source has a URL that its block lists need."""
    if not (field := url_field(source)) or is_remote(source.path):
        return
    rows = ((file.path, row) for file in list_files(name, source) for row in read_rows(file.path, source))
    usable = ((path, row) for path, row in rows if isinstance(row, SourceRow))
    last_path = ""
    for path, row in islice(usable, _MAX_ROWS_WITHOUT_URL):
        if row.url:
            return
        last_path = path
    if last_path:
        remedy = f"set data.sources.{name}.url, or clean.url_block_lists to []"
        raise InputError(f"{last_path}: no row has a URL in {field!r}; {remedy}")


def cleaning_stages(recipe: Recipe, task_sources: Sequence[str], work: Path) -> tuple[CleaningStage, ...]:
    """Return the stages that must finish before tokens are written, in order.

    `task_sources` lists the name of each task's source. The stages write to `work`.
    """
    cleanings = {name: source.clean for name, source in recipe.data.sources.items()}
    stages = []
    if blocked := list(dict.fromkeys(own.url_block_lists for own in cleanings.values() if own.url_block_lists)):
        run = partial(block_lists.write_index, blocked, work / "block_lists")
        stages.append(CleaningStage("url-block-lists", len(blocked), run))
    if wanted := decontamination.wanted_indexes(cleanings):
        run = partial(decontamination.write_index, wanted, work / "decontamination")
        stages.append(CleaningStage("decontamination-index", len(wanted), run))
    kinds = [cleanings[source].deduplicate for source in task_sources]
    for kind in sorted({kind for kind in kinds if kind}):
        folder, count = work / kind, len(kinds)
        write = partial(_write_filtered_keys, recipe, task_sources, work, kind)
        find = partial(deduplication.find_equal_keys, folder, count)
        stages.append(CleaningStage(f"{kind}-keys", count, write))
        stages.append(CleaningStage(f"{kind}-pairs", deduplication.KEY_RANGES, find))
        stages.append(CleaningStage(f"{kind}-clusters", 1, partial(deduplication.find_clusters, folder, count)))
    return tuple(stages)


def cleaning_steps(
    recipe: Recipe,
    source_name: str,
    rank: int,
    work: Path,
    on_drop: DropCallback,
    on_change: Callable[[str], None] = lambda reason: None,
) -> list[Step]:
    """Return the cleaning steps for the documents of task `rank`, which reads the source `source_name`.

    The steps use the results of the cleaning stages in `work`, and call `on_drop` for each dropped document and
    `on_change` for each masked document, with the reason.
    """
    cleaning = recipe.data.sources[source_name].clean
    steps = _filter_steps(cleaning, work, on_drop)
    if kind := cleaning.deduplicate:
        if steps:
            steps = [partial(_filter, "", _filtered_check(work, rank), on_drop)]
            if _CHANGES_TEXT in cleaning.filters:
                steps += _filter_steps(cleaning, work, on_drop, only=_CHANGES_TEXT)
        steps.append(partial(_drop_duplicates, work / kind, kind, rank, on_drop))
    if cleaning.decontaminate:
        index = decontamination.read_index(work / "decontamination", cleaning)
        steps.append(partial(_drop_contaminated, index, cleaning.decontamination_words, on_drop))
    if cleaning.mask_personal_data:
        steps.append(partial(_mask, on_change))
    return steps


def _filter_steps(cleaning: Cleaning, work: Path, on_drop: DropCallback, only: str | None = None) -> list[Step]:
    """Return the steps that decide about each document on its own, or only the step with the given name."""
    checks: dict[str, Check] = {}
    if names := cleaning.url_block_lists:
        index = block_lists.read_index(work / "block_lists", names)
        checks["url_block_lists"] = lambda document: block_lists.url_reason(document.metadata[URL], index, names)
    if wanted := cleaning.languages:
        probability = cleaning.min_language_probability
        checks["languages"] = lambda document: languages.language_reason(document.text, wanted, probability)
    if cleaning.filters:
        from tinyllama.prepare.quality import quality_check  # noqa: PLC0415 - needs the extra `clean`

        checks |= {name: quality_check(name, cleaning) for name in cleaning.filters}
    return [partial(_filter, f"{name}: ", check, on_drop) for name, check in checks.items() if only in (None, name)]


def _filter(prefix: str, check: Check, on_drop: DropCallback, documents: Iterator[Document]) -> Iterator[Document]:
    for document in documents:
        if reason := check(document):
            _drop(document, prefix + reason, on_drop)
        else:
            yield document


def _write_filtered_keys(
    recipe: Recipe,
    task_sources: Sequence[str],
    work: Path,
    kind: Literal["exact", "minhash"],
    documents: Iterator[Document],
    rank: int,
) -> None:
    """Write the keys of the documents of task `rank` that pass the filters; save which other documents are dropped."""
    cleaning = recipe.data.sources[task_sources[rank]].clean
    if cleaning.deduplicate != kind:
        return
    dropped: dict[str, list[int]] = {}

    def save(document: Document) -> None:
        dropped.setdefault(document.metadata[_REASON], []).append(_place(document))

    steps = _filter_steps(cleaning, work, save)
    for step in steps:
        documents = step(documents)
    deduplication.write_keys(work / kind, kind, documents, rank)
    if steps:
        with atomic_write(_filtered_path(work, rank)) as file:
            file.write(orjson.dumps(dropped))


def _filtered_check(work: Path, rank: int) -> Check:
    """Return the decisions that `_write_filtered_keys` saved, as a check."""
    saved = read_json(_filtered_path(work, rank))
    reasons = {place: reason for reason, places in saved.items() for place in places}
    return lambda document: reasons.get(_place(document))


def _filtered_path(work: Path, rank: int) -> Path:
    return work / f"filtered/{rank:06d}.json"


def _place(document: Document) -> int:
    """Return a number that identifies a document in its task: the index of its file, and the row in the lower bits."""
    return int(document.metadata["input"] << 32 | document.metadata["row"])


def _mask(on_change: Callable[[str], None], documents: Iterator[Document]) -> Iterator[Document]:
    from tinyllama.prepare.personal_data import MASKS  # noqa: PLC0415 - needs the extra `clean`

    for document in documents:
        for reason, mask in MASKS.items():
            if (masked := mask(document.text)) != document.text:
                document.text = masked
                on_change(reason)
        yield document


def _drop(document: Document, reason: str, on_drop: DropCallback) -> None:
    document.metadata[_REASON] = reason
    on_drop(document)


def _drop_duplicates(
    folder: Path, kind: str, rank: int, on_drop: DropCallback, documents: Iterator[Document]
) -> Iterator[Document]:
    duplicates = deduplication.read_duplicates(folder, rank)
    for number, document in enumerate(documents):
        if kept := duplicates.pop(number, None):
            document.metadata[KEPT_DOCUMENT] = kept
            _drop(document, f"duplicate ({kind})", on_drop)
        else:
            yield document
    if duplicates:
        raise InputError(f"{folder}: document {min(duplicates)} of task {rank} no longer exists; run prepare again")


def _drop_contaminated(
    index: decontamination.Index, length_words: int, on_drop: DropCallback, documents: Iterator[Document]
) -> Iterator[Document]:
    for document in documents:
        if found := decontamination.matching_items(index, document.text, length_words):
            document.metadata[MATCHING_ITEMS] = found
            _drop(document, f"contaminated: {', '.join(found)}", on_drop)
        else:
            yield document
