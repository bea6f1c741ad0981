"""What a recipe takes out of its sources: duplicates, then bad text, then evaluation items; datatrove's blocks.

Says which stages must be done before tokens are written and which steps stand between reading and writing a task;
who runs them, and keeps a record of what is done, is the caller. Nothing here runs, or imports the extra `clean`, where
a recipe asks for nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

from datatrove.data import Document

from tinyllama.errors import InputError
from tinyllama.prepare import decontamination, deduplication
from tinyllama.prepare.dropping import DropCallback, DroppedDocumentWriter, drop_document
from tinyllama.prepare.ngrams import words
from tinyllama.recipe import Cleaning, Recipe

Step = Callable[[Any, int, int], Any]
"""A step of a datatrove pipeline: (documents, rank, number of ranks) -> documents."""

# A filter's lists of words and of their runs were seen to take up to 120 bytes a character.
_MOST_CHARACTERS = 5_000_000


@dataclass(frozen=True)
class CleaningStage:
    """A stage that must be done by all its tasks before the next one begins."""

    name: str
    tasks: int
    steps: list[Step]


def cleaning_stages(recipe: Recipe, task_sources: Sequence[str], work: Path, read: Step) -> list[CleaningStage]:
    """The stages before tokens are written, in order; none where no source asks for any.

    `task_sources` is the source of each task, `read` a step that reads the documents of task `rank`. What the stages
    leave for `steps` lies in `work`. Raises InputError where a source asks for what is not installed, or for a language
    without rules.
    """
    cleanings = {name: source.clean for name, source in recipe.data.sources.items()}
    for name, cleaning in cleanings.items():
        _check(name, cleaning)
    asked = [cleanings[source] for source in task_sources]
    return [
        *_decontamination_stages(cleanings, work / "decontamination"),
        *_exact_stages([cleaning.deduplicate == "exact" for cleaning in asked], work / "exact", read),
        *_minhash_stages(
            [cleaning.language if cleaning.deduplicate == "minhash" else None for cleaning in asked],
            work / "minhash",
            read,
        ),
    ]


def _check(source: str, cleaning: Cleaning) -> None:
    place = f"data.sources.{source}.clean"
    asked = [name for name in ("deduplicate", "filters", "decontaminate") if getattr(cleaning, name)]
    if not asked:
        return
    for module in ("regex", "spacy"):
        if find_spec(module) is None:
            raise InputError(f"{place}.{asked[0]}: needs the package {module}; pip install 'tinyllama[clean]'")
    if cleaning.decontaminate and find_spec("lm_eval") is None:
        raise InputError(f"{place}.decontaminate: needs the package lm-eval; pip install 'tinyllama[clean,evaluate]'")
    if asked == ["deduplicate"] and cleaning.deduplicate == "exact":
        return
    try:
        list(words("one word", cleaning.language))
    except ValueError:
        raise InputError(
            f"{place}.language: {cleaning.language!r} has no rules for words; give an ISO 639-1 code such as en"
        ) from None
    except ImportError as error:
        raise InputError(f"{place}.language: {cleaning.language!r}: {' '.join(str(error).split())}") from None


def _decontamination_stages(cleanings: dict[str, Cleaning], folder: Path) -> list[CleaningStage]:
    wanted = [(name, cleaning) for name, cleaning in cleanings.items() if cleaning.decontaminate]
    index = partial(decontamination.write_indexes, wanted, folder)
    return [CleaningStage("decontamination-index", len(wanted), [index])] if wanted else []


def _exact_stages(takes_part: list[bool], folder: Path, read: Step) -> list[CleaningStage]:
    if not any(takes_part):
        return []
    counts = accumulate(takes_part)
    places = [count - 1 if takes else None for takes, count in zip(takes_part, counts, strict=True)]
    return [
        CleaningStage(
            "exact-signatures", len(places), [read, partial(deduplication.write_exact_signatures, folder, places)]
        ),
        CleaningStage("exact-finders", deduplication.EXACT_FINDERS, [partial(deduplication.find_exact, folder)]),
    ]


def _minhash_stages(languages: list[str | None], folder: Path, read: Step) -> list[CleaningStage]:
    if not any(languages):
        return []
    sign = partial(deduplication.sign_minhash, folder, languages)
    return [
        CleaningStage("minhash-signatures", len(languages), [read, sign]),
        CleaningStage("minhash-buckets", deduplication.MINHASH_BUCKETS, [partial(deduplication.find_minhash, folder)]),
        CleaningStage("minhash-clusters", 1, [partial(deduplication.keep_first, folder)]),
    ]


def steps(recipe: Recipe, source_name: str, work: Path, on_excluded: DropCallback) -> list[Step]:
    """The steps between reading and writing a task of a source, after the preliminary stages.

    The first must get the task's documents as the stages read them. `on_excluded` is called once with each document
    that goes.
    """
    cleaning = recipe.data.sources[source_name].clean
    chain: list[Step] = []
    if kind := cleaning.deduplicate:
        chain.append(partial(deduplication.drop_duplicates, work / kind, kind, on_excluded))
    chain += [partial(_filter, name, cleaning.language, on_excluded) for name in cleaning.filters]
    if cleaning.decontaminate:
        folder = work / "decontamination"
        chain.append(partial(decontamination.drop_contaminated, folder, source_name, cleaning, on_excluded))
    return chain


def overlap(work: Path, source_name: str, dropped: Sequence[dict[str, list[int]]]) -> dict[str, dict[str, int]]:
    """What `decontamination.overlap` says of a source."""
    return decontamination.overlap(work / "decontamination", source_name, dropped)


def _filter(
    name: str, language: str, on_excluded: DropCallback, data: Iterator[Document], rank: int, world: int
) -> Iterator[Document]:
    """Pipeline step: the documents that pass one of datatrove's quality filters."""
    short = _drop_oversized(name, on_excluded, data)
    yield from _quality_filter(name, language, DroppedDocumentWriter(name, on_excluded)).run(short, rank, world)


def _drop_oversized(name: str, on_excluded: DropCallback, data: Iterator[Document]) -> Iterator[Document]:
    for document in data:
        if len(document.text) > _MOST_CHARACTERS:
            drop_document(document, f"{name}: over {_MOST_CHARACTERS:,} characters, too long to judge", on_excluded)
        else:
            yield document


def _quality_filter(name: str, language: str, writer: DroppedDocumentWriter) -> Any:
    """A filter with its paper's thresholds, which are datatrove's defaults."""
    from datatrove.pipeline import filters  # noqa: PLC0415 - needs the extra `clean`

    match name:
        case "gopher_repetition":
            return filters.GopherRepetitionFilter(exclusion_writer=writer, language=language)
        case "gopher_quality":
            # The paper's stop words are English; another language's text would hold none of them.
            stop_words = 2 if language == "en" else None
            return filters.GopherQualityFilter(min_stop_words=stop_words, exclusion_writer=writer, language=language)
        case "c4":
            return filters.C4QualityFilter(exclusion_writer=writer, language=language)
        case _:
            return filters.FineWebQualityFilter(exclusion_writer=writer, language=language)
