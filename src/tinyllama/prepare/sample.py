"""A sample of the recipe's text for training its tokenizer.

Reads the sources' files, at most 64 of each, evenly spread over the sorted list; documents held out for
validation are skipped. If no document of a source is in the sample, the beginning of its first one is used.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tinyllama.errors import InputError, first_line
from tinyllama.prepare.file_warnings import remedy_of
from tinyllama.prepare.holdout import HELD_OUT, hash_to_unit_interval, split_tail
from tinyllama.prepare.sources import InputFile, RejectedRow, list_files, read_rows
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe, Source
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import TrainingText, train_on_lines, training_text

_MOST_FILES = 64
# Compressed text and code take about a quarter of their bytes; only the share of documents to try depends on it.
_BYTES_PER_DISK_BYTE = 4


def train_recipe_tokenizer(recipe: Recipe, vocab_size: int, sample_bytes: int) -> tuple[Path, TrainingText]:
    """Train a Llama-style BPE on a sample of the recipe's sources; return the recipe's tokenizer folder and the text.

    Raises InputError where that folder holds a tokenizer, on which a store or a run may rely, and where the sources
    give no text.
    """
    folder = Path(recipe.tokenizer)
    if folder.is_file():
        raise InputError(f"tokenizer: {folder} is a file; name a folder for the trained tokenizer")
    if (folder / "tokenizer.json").exists():  # written last: without it the folder is an interrupted run's
        raise InputError(f"tokenizer: {folder} is there already; name another folder in the recipe, or delete it")
    if (folder / "tokenizer.model").exists():
        try:
            Tokenizer.load(folder)
        except InputError as error:  # none of ours
            raise InputError(f"{first_line(error)}; it is kept: name another folder in `tokenizer`") from None
    reasons: Counter[str] = Counter()
    text = training_text(sample_texts(recipe, sample_bytes, reasons))
    if not text.lines and reasons:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise InputError(f"data.sources: no text to train the tokenizer on ({counts}); {remedy_of(reasons)}")
    train_on_lines(text, vocab_size).save(folder, recipe.model.context_length)
    return folder, text


def sample_texts(recipe: Recipe, sample_bytes: int, reasons: Counter[str] | None = None) -> Iterator[str]:
    """About `sample_bytes` of training text, each source by its weight, the same for the same files and recipe.

    Rows that give no text are counted in `reasons`.
    """
    unused = Counter() if reasons is None else reasons
    weights = sum(source.weight for source in recipe.data.sources.values())
    planned: list[tuple[list[InputFile], Source, float]] = []
    for name, source in recipe.data.sources.items():
        files = [file for file in list_files(name, source) if file.split == "train"]
        planned.append((files[:: -(-len(files) // _MOST_FILES)], source, sample_bytes * source.weight / weights))
    with Bar("reading a sample", sum(file.size for files, *_ in planned for file in files), BYTES) as bar:
        done = 0
        for files, source, wanted_bytes in planned:
            disk_bytes = sum(file.size for file in files)
            share = min(1.0, wanted_bytes / max(1, disk_bytes * _BYTES_PER_DISK_BYTE))
            is_empty = True
            for file in files:
                for text in _sample_file(file, source, share, recipe.data.validation_fraction, unused):
                    is_empty = False
                    yield text
                done += file.size
                bar.show(done)
            if is_empty and share:  # so few documents that none has a hash of the share
                found = _sample_file(
                    files[0], source, 1.0, recipe.data.validation_fraction, Counter(), int(wanted_bytes)
                )
                yield from islice(found, 1)


def _sample_file(
    file: InputFile, source: Source, share: float, holdout: float, unused: Counter[str], most: int | None = None
) -> Iterator[str]:
    """The first `most` characters of documents whose content hash is above the holdout's part and inside the share."""
    has_tail = source.holdout == "tail"
    least = 0.0 if has_tail else holdout
    for row in read_rows(file.path, source):
        if isinstance(row, RejectedRow):
            unused[row.reason] += 1
        elif (place := hash_to_unit_interval(row.text)) < least:
            unused[HELD_OUT] += 1
        elif place < least + share:
            yield to_str(split_tail(row.text, holdout)[0] if has_tail else row.text)[:most]
