"""A sample of the recipe's text for training its tokenizer.

Reads the sources' files, at most 64 of each, evenly spread over the sorted list; what is held out for validation is
left out here too. Of a source whose few documents all miss the sample, it is the beginning of the first.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tinyllama.data.holdout import content_share, split_tail
from tinyllama.data.sources import InputFile, Row, list_files, read_rows
from tinyllama.errors import InputError
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe
from tinyllama.recipe_data import Source
from tinyllama.text import as_string
from tinyllama.tokenizer_training import TrainingText, train_on_lines, training_text

_MOST_FILES = 64
# Compressed text and code take about a quarter of their bytes; only the share of documents to try depends on it.
_BYTES_PER_DISK_BYTE = 4


def train_recipe_tokenizer(recipe: Recipe, vocab_size: int, sample_bytes: int) -> tuple[Path, TrainingText]:
    """Train a Llama-style BPE on a sample of the recipe's sources; return the recipe's tokenizer folder and the text.

    Raises InputError where that folder is there already: a store or a run may rely on it.
    """
    folder = Path(recipe.tokenizer)
    if (folder / "tokenizer.json").exists():  # written last: without it the folder is an interrupted run's
        raise InputError(f"tokenizer: {folder} is there already; name another folder in the recipe, or delete it")
    text = training_text(sample_texts(recipe, sample_bytes))
    train_on_lines(text, vocab_size).save(folder, recipe.model.context)
    return folder, text


def sample_texts(recipe: Recipe, sample_bytes: int) -> Iterator[str]:
    """About `sample_bytes` of training text, each source by its weight, the same for the same files and recipe."""
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
                for text in _sample_file(file, source, share, recipe.data.holdout):
                    is_empty = False
                    yield text
                done += file.size
                bar.show(done)
            if is_empty and share:  # so few documents that none has a hash of the share
                yield from islice(_sample_file(files[0], source, 1.0, recipe.data.holdout, int(wanted_bytes)), 1)


def _sample_file(
    file: InputFile, source: Source, share: float, holdout: float, most: int | None = None
) -> Iterator[str]:
    """The first `most` characters of documents whose content hash is above the holdout's part and inside the share."""
    has_tail = source.holdout == "tail"
    least = 0.0 if has_tail else holdout
    for row in read_rows(file.path, source):
        if isinstance(row, Row) and least <= content_share(row.text) < least + share:
            yield as_string(split_tail(row.text, holdout)[0] if has_tail else row.text)[:most]
