"""Cleaning: removal of duplicates, then of documents with low quality, then of documents with evaluation items.

Cleaning stages, such as the search for duplicates, run before any tokens are written. All tasks of a stage finish
before the next stage starts. Cleaning steps then drop documents from the stream of documents that a task writes.
The quality filters come from datatrove. Packages of the extra `clean` are imported only if a recipe needs them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

from datatrove.data import Document

from tinyllama.errors import InputError
from tinyllama.prepare import decontamination, deduplication
from tinyllama.recipe import Recipe

DropCallback = Callable[[Document], None]
"""Function that is called once per dropped document, with the reason in `metadata["filter_reason"]`."""
Step = Callable[[Iterator[Document]], Iterator[Document]]
KEPT_DOCUMENT = "kept_document"
"""Key in the metadata of a duplicate; the value is the `Place` of the document that is kept."""
MATCHING_ITEMS = "matching_items"
"""Key in the metadata of a contaminated document; the value lists the matching items of each evaluation task."""

_MAX_CHARACTERS = 5_000_000
"""Maximum document length for filters, in characters; a filter's list of words takes up to 120 bytes per character."""


class CleaningStage(NamedTuple):
    """A cleaning stage, whose tasks must all finish before the next stage starts."""

    name: str
    tasks: int
    run: Callable[[Iterator[Document], int], None]
    """Function that runs task `rank` of the stage, given the documents of the recipe's task `rank`, and `rank`."""


def check_cleaning(recipe: Recipe) -> None:
    """Check the packages and languages of all sources.

    Raises InputError if a package that a source needs is missing, or if the language has no word-splitting rules.
    """
    for name, source in recipe.data.sources.items():
        cleaning, place = source.clean, f"data.sources.{name}.clean"
        if cleaning.decontaminate and find_spec("lm_eval") is None:
            raise InputError(f"{place}: needs lm_eval; pip install 'tinyllama[evaluate]'")
        if not cleaning.filters:
            continue
        packages, extras = ["regex", "spacy"], "clean"
        if missing := [package for package in packages if find_spec(package) is None]:
            raise InputError(f"{place}: needs {', '.join(missing)}; pip install 'tinyllama[{extras}]'")
        from datatrove.utils.word_tokenizers import load_word_tokenizer  # noqa: PLC0415 - part of the extra `clean`

        try:
            load_word_tokenizer(cleaning.language)
        except ValueError:
            raise InputError(
                f"{place}.language: no word-splitting rules for {cleaning.language!r}; set an ISO 639-1 code like en"
            ) from None
        except ImportError as error:
            raise InputError(f"{place}.language: {cleaning.language!r}: {' '.join(str(error).split())}") from None


def cleaning_stages(recipe: Recipe, task_sources: Sequence[str], work: Path) -> tuple[CleaningStage, ...]:
    """Return the stages that must finish before tokens are written, in order.

    `task_sources` lists the name of each task's source. The stages write to `work`.
    """
    cleanings = {name: source.clean for name, source in recipe.data.sources.items()}
    stages = []
    if wanted := decontamination.wanted_indexes(cleanings):
        run = partial(decontamination.write_index, wanted, work / "decontamination")
        stages.append(CleaningStage("decontamination-index", len(wanted), run))
    kinds = [cleanings[source].deduplicate for source in task_sources]
    for kind in sorted({kind for kind in kinds if kind}):
        folder, count = work / kind, len(kinds)
        write = partial(deduplication.write_keys, folder, kinds, kind)
        find = partial(deduplication.find_equal_keys, folder, count)
        stages.append(CleaningStage(f"{kind}-keys", count, write))
        stages.append(CleaningStage(f"{kind}-pairs", deduplication.KEY_RANGES, find))
        stages.append(CleaningStage(f"{kind}-clusters", 1, partial(deduplication.find_clusters, folder, count)))
    return tuple(stages)


def cleaning_steps(recipe: Recipe, source_name: str, rank: int, work: Path, on_drop: DropCallback) -> list[Step]:
    """Return the cleaning steps for the documents of task `rank`, which reads the source `source_name`.

    The steps use the results of the cleaning stages in `work`, and call `on_drop` for each dropped document.
    """
    cleaning = recipe.data.sources[source_name].clean
    steps: list[Step] = []
    if kind := cleaning.deduplicate:
        steps.append(partial(_drop_duplicates, work / kind, kind, rank, on_drop))
    steps += [partial(_filter, name, cleaning.language, on_drop) for name in cleaning.filters]
    if cleaning.decontaminate:
        index = decontamination.read_index(work / "decontamination", cleaning)
        steps.append(partial(_drop_contaminated, index, cleaning.decontamination_words, on_drop))
    return steps


def _drop(document: Document, reason: str, on_drop: DropCallback) -> None:
    document.metadata["filter_reason"] = reason
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


def _filter(name: str, language: str, on_drop: DropCallback, documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents that pass one of datatrove's quality filters."""

    def short() -> Iterator[Document]:
        for document in documents:
            if len(document.text) > _MAX_CHARACTERS:
                _drop(document, f"{name}: over {_MAX_CHARACTERS:,} characters, too long for filters", on_drop)
            else:
                yield document

    yield from _quality_filter(name, language, _DroppedDocumentWriter(name, on_drop)).run(short(), 0, 1)


@dataclass
class _DroppedDocumentWriter:
    """`exclusion_writer` of a datatrove filter, which passes each dropped document to `on_drop`.

    The drop reason begins with the filter's name.
    """

    filter: str
    on_drop: DropCallback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        _drop(document, f"{self.filter}: {document.metadata['filter_reason']}", self.on_drop)


def _quality_filter(name: str, language: str, writer: _DroppedDocumentWriter) -> Any:
    """Return a datatrove filter with its default thresholds, which come from the filter's paper."""
    from datatrove.pipeline import filters  # noqa: PLC0415 - needs the extra `clean`

    kinds = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    # The stop words of the Gopher paper are English, so texts in other languages need not contain them.
    options = {"min_stop_words": None} if name == "gopher_quality" and language != "en" else {}
    return kinds[name](exclusion_writer=writer, language=language, **options)
