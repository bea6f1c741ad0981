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
from tinyllama.recipe import Cleaning, Recipe

DropCallback = Callable[[Document], None]
"""Function that is called once per dropped document, with the reason in `metadata["filter_reason"]`."""
Step = Callable[[Iterator[Document]], Iterator[Document]]
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
        if not (cleaning.deduplicate == "minhash" or cleaning.filters or cleaning.decontaminate):
            continue
        packages, extras = ["regex", "spacy"], "clean"
        if cleaning.decontaminate:
            packages, extras = [*packages, "lm_eval"], "clean,evaluate"
        if missing := [package for package in packages if find_spec(package) is None]:
            raise InputError(f"{place}: needs {', '.join(missing)}; pip install 'tinyllama[{extras}]'")
        try:
            list(decontamination.words("one word", cleaning.language))
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
    decontaminated = [(name, cleaning) for name, cleaning in cleanings.items() if cleaning.decontaminate]
    if decontaminated:
        run = partial(decontamination.write_index, decontaminated, work / "decontamination")
        stages.append(CleaningStage("decontamination-index", len(decontaminated), run))
    exact = [rank for rank, source in enumerate(task_sources) if cleanings[source].deduplicate == "exact"]
    if exact:
        sign = partial(deduplication.write_exact_signatures, work / "exact", exact)
        find = partial(deduplication.find_exact_duplicates, work / "exact", exact)
        stages.append(CleaningStage("exact-signatures", len(task_sources), sign))
        stages.append(CleaningStage("exact-duplicates", deduplication.EXACT_RANGES, find))
    asked = [cleanings[source] for source in task_sources]
    languages = [cleaning.language if cleaning.deduplicate == "minhash" else None for cleaning in asked]
    if any(languages):
        folder = work / "minhash"
        sign = partial(deduplication.sign_minhash, folder, languages)
        pair = partial(deduplication.find_minhash_pairs, folder)
        stages.append(CleaningStage("minhash-signatures", len(languages), sign))
        stages.append(CleaningStage("minhash-buckets", deduplication.MINHASH_BUCKETS, pair))
        stages.append(CleaningStage("minhash-clusters", 1, partial(deduplication.find_minhash_duplicates, folder)))
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
        index = decontamination.read_index(work / "decontamination", source_name)
        steps.append(partial(_drop_contaminated, index, cleaning, on_drop))
    return steps


def _drop(document: Document, reason: str, on_drop: DropCallback) -> None:
    document.metadata["filter_reason"] = reason
    on_drop(document)


def _drop_duplicates(
    folder: Path, kind: str, rank: int, on_drop: DropCallback, documents: Iterator[Document]
) -> Iterator[Document]:
    duplicates = deduplication.read_duplicates(folder, rank)
    for number, document in enumerate(documents):
        if number in duplicates:
            duplicates.remove(number)
            _drop(document, f"duplicate ({kind})", on_drop)
        else:
            yield document
    if duplicates:
        raise InputError(f"{folder}: document {min(duplicates)} of task {rank} no longer exists; run prepare again")


def _drop_contaminated(
    index: decontamination.Index, cleaning: Cleaning, on_drop: DropCallback, documents: Iterator[Document]
) -> Iterator[Document]:
    for document in documents:
        ngrams = decontamination.hashed_ngrams(document.text, cleaning.language, cleaning.decontamination_words)
        if found := decontamination.matching_items(index, ngrams):
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
