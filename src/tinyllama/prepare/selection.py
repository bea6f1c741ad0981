"""Selection of documents by content: the validation split, and the sample for training the recipe's tokenizer.

A hash of the text selects documents, so that copies of a document are in the same split. The sample contains documents
of at most 64 files per source, which are evenly distributed over the sorted list of files. The sample contains no
validation text. If no document of a source is selected, the beginning of the source's first document is used.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tinyllama.errors import InputError, first_line
from tinyllama.prepare.readers import RejectedRow, read_rows
from tinyllama.prepare.sources import InputFile, list_files
from tinyllama.prepare.store_warnings import HELD_OUT, rejection_remedy
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe, Source
from tinyllama.text import TextLike, iter_utf8_chunks, to_str, utf8_boundary_before
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import TrainingText, train_tokenizer, training_text

_VOCAB_SIZE = 8192
_MAX_FILES = 64
# Assumed compression ratio of text and code. It affects only the fraction of documents in the sample.
_BYTES_PER_DISK_BYTE = 4


def hash_to_unit_interval(text: TextLike) -> float:
    """Return a hash of a text's UTF-8 bytes as a number in [0, 1)."""
    digest = hashlib.blake2b(digest_size=8)
    for chunk in iter_utf8_chunks(text):
        digest.update(chunk)
    return int.from_bytes(digest.digest(), "little") / 2**64


def split_tail(text: TextLike, fraction: float) -> tuple[TextLike, TextLike]:
    """Split a text between characters into a first part and a tail, the last `fraction` of its UTF-8 bytes.

    The tail is empty if the text is too short for two parts.
    """
    data = text.encode() if isinstance(text, str) else text
    size = int(len(data) * fraction)
    cut = utf8_boundary_before(data, len(data) - size) if size else 0
    if not cut:
        return text, ""
    parts = data[:cut], data[cut:]
    return (to_str(parts[0]), to_str(parts[1])) if isinstance(text, str) else parts


def train_recipe_tokenizer(recipe: Recipe, vocab_size: int | None, sample_bytes: int) -> tuple[Path, TrainingText]:
    """Train a Llama-style BPE on a sample of the recipe's sources; return its folder and the training text.

    If `vocab_size` is None, the recipe's `vocab_size` is used, or 8,192 without it.

    Raises InputError if the sources have no text, or if the folder contains a tokenizer, because a store or a run may
    use this tokenizer.
    """
    folder = Path(recipe.tokenizer)
    if folder.is_file():
        raise InputError(f"tokenizer: {folder} is a file; name a folder for the trained tokenizer")
    if (folder / "tokenizer.json").exists():  # written last; without this file, the command was interrupted
        raise InputError(f"tokenizer: {folder} exists; name another folder in the recipe, or delete this one")
    if (folder / "tokenizer.model").exists():
        try:
            Tokenizer.load(folder)
        except InputError as error:  # another program may have written the file
            raise InputError(
                f"{first_line(error)}; the file is not overwritten, so name another folder in `tokenizer`"
            ) from None
    reasons: Counter[str] = Counter()
    text = training_text(sample_texts(recipe, sample_bytes, reasons))
    if not text.lines and reasons:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise InputError(f"data.sources: no text to train the tokenizer on ({counts}); {rejection_remedy(reasons)}")
    if vocab_size is None:
        vocab_size = recipe.vocab_size or _VOCAB_SIZE
    train_tokenizer(text, vocab_size).save(folder, recipe.model.context_length)
    return folder, text


def sample_texts(recipe: Recipe, sample_bytes: int, rejected: Counter[str] | None = None) -> Iterator[str]:
    """Yield about `sample_bytes` of training text, divided among the sources by weight.

    The same files always produce the same sample. Rows without training text are counted in `rejected`, by reason.
    """
    rejected = Counter() if rejected is None else rejected
    sources = recipe.data.sources
    total_weight = sum(source.weight for source in sources.values())
    files: dict[str, list[InputFile]] = {}
    for name, source in sources.items():
        train_files = [file for file in list_files(name, source) if file.split == "train"]
        files[name] = train_files[:: -(-len(train_files) // _MAX_FILES)]
    with Bar("reading a sample", sum(file.size for chosen in files.values() for file in chosen), BYTES) as bar:
        done = 0
        for name, source in sources.items():
            wanted_bytes = sample_bytes * source.weight / total_weight
            disk_bytes = sum(file.size for file in files[name])
            fraction = min(1.0, wanted_bytes / max(1, disk_bytes * _BYTES_PER_DISK_BYTE))
            is_empty = True
            for file in files[name]:
                for text in _sample_file(file.path, source, fraction, recipe.data.validation_fraction, rejected):
                    is_empty = False
                    yield text
                done += file.size
                bar.show(done)
            if is_empty and fraction:  # the source has so few documents that none was selected
                path = files[name][0].path
                texts = _sample_file(path, source, 1.0, recipe.data.validation_fraction, Counter())
                yield from (text[: int(wanted_bytes)] for text in islice(texts, 1))


def _sample_file(
    path: str, source: Source, fraction: float, validation_fraction: float, rejected: Counter[str]
) -> Iterator[str]:
    """Yield the training documents of a file that are selected for the sample.

    The hash of a selected document is in a range of length `fraction`, which begins where validation's range ends.
    """
    has_tail = source.holdout == "tail"
    start = 0.0 if has_tail else validation_fraction
    for row in read_rows(path, source):
        if isinstance(row, RejectedRow):
            rejected[row.reason] += 1
        elif (position := hash_to_unit_interval(row.text)) < start:
            rejected[HELD_OUT] += 1
        elif position < start + fraction:
            yield to_str(split_tail(row.text, validation_fraction)[0] if has_tail else row.text)
