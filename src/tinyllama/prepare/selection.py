"""Selection of documents by content: the validation split, and the sample for training the recipe's tokenizer.

A hash of the text selects documents, so that copies of a document are in the same split. The sample of a large source
contains documents of at least 64 files, which are evenly distributed over the sorted list of files. The sample contains
no validation text. If no document of a source is selected, the beginning of the source's first document is used.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tinyllama.errors import InputError, first_line, translate_damage_errors
from tinyllama.files import read_json
from tinyllama.prepare.readers import RejectedRow, SourceRow, read_rows
from tinyllama.prepare.sources import InputFile, compression_of, file_kind, list_files, text_field
from tinyllama.prepare.store_warnings import HELD_OUT, no_document_error
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe, Source, TokenizerKind
from tinyllama.recipe.loading import printable
from tinyllama.runs.run_dir import RunDir
from tinyllama.text import TextLike, hash_text, iter_utf8_chunks, to_str, utf8_boundary_before
from tinyllama.tokenizer import SAVED_FILES, Tokenizer
from tinyllama.tokenizer.training import TrainingText, train_tokenizer, training_text

SAMPLE_BYTES = 16_000_000
"""Default size of the text that a tokenizer is trained on."""
_VOCAB_SIZE = 8192
_MIN_FILES = 64
_MAX_NAMED_FIELDS = 20
_MAX_SEARCHED_ROWS = 1000
# Assumed compression ratio of text and code. It affects only the number of files and documents in the sample.
_COMPRESSION_RATIO = 4


def hash_to_unit_interval(text: TextLike) -> float:
    """Return a hash of a text's UTF-8 bytes as a number in [0, 1)."""
    return int.from_bytes(hash_text(text), "little") / 2**64


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


@dataclass
class SourceSample:
    """Counts of the documents of one source that a tokenizer is trained on, and of the rows that were not used."""

    documents: int = 0
    text_bytes: int = 0
    """Size of the documents in UTF-8."""
    usable_rows: int = 0
    """Rows with text, including those that were not selected."""
    unused: Counter[str] = field(default_factory=Counter)
    """Number of rows without text to train on, by reason."""
    fields: dict[str, None] = field(default_factory=dict)
    """Names of the fields of rows without text, in the order of the rows."""

    def add_rejected(self, row: RejectedRow) -> None:
        """Count a rejected row."""
        self.unused[row.reason] += 1
        if len(self.fields) < _MAX_NAMED_FIELDS:
            self.fields |= dict.fromkeys(row.fields)

    def error(self, name: str, source: Source, where: str = "") -> InputError:
        """Return the error for a source without text to train on; `where` names the files that were read."""
        fields = [printable(one) for one in self.fields if one != text_field(source)]
        has_fields = f"; its rows have the fields {', '.join(fields[:_MAX_NAMED_FIELDS])}" if fields else ""
        return no_document_error(name, self.unused, where + has_fields)


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was trained on a sample of a recipe's sources."""

    folder: Path
    vocab_size: int
    sample: dict[str, SourceSample]
    text: TrainingText

    def lines(self) -> Iterator[str]:
        """Yield lines with the size of the sample by source, and of the text."""
        for name, one in self.sample.items():
            yield f"sample of {name}: {one.documents:,} documents, {one.text_bytes:,} bytes"
        yield str(self.text)

    def __str__(self) -> str:
        """Return the folder, and the indented lines of `lines`."""
        return "\n".join(
            [f"tokenizer: {self.folder}, {self.vocab_size:,} tokens", *(f"    {line}" for line in self.lines())]
        )


def train_recipe_tokenizer(
    recipe: Recipe,
    vocab_size: int | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    force: bool = False,
    kind: TokenizerKind | None = None,
) -> TrainedTokenizer:
    """Train a BPE on a sample of the recipe's sources, and save it in the folder that the recipe names.

    If `vocab_size` is None, the recipe's `vocab_size` is used, or 8,192 without it. If `kind` is None, the recipe's
    `tokenizer_kind` is used. Raises InputError if a source has no text to train on, or if the folder contains a
    tokenizer. With `force`, this tokenizer is replaced, unless the recipe's store or run was made with it or the folder
    has other files.
    """
    folder = Path(recipe.tokenizer)
    _check_tokenizer_folder(recipe, folder, force)
    sample: dict[str, SourceSample] = {}
    text = training_text(sample_texts(recipe, sample_bytes, sample), kind=kind or recipe.tokenizer_kind)
    if vocab_size is None:
        vocab_size = recipe.vocab_size or _VOCAB_SIZE
    train_tokenizer(text, vocab_size).save(folder, recipe.model.context_length)
    return TrainedTokenizer(folder, vocab_size, sample, text)


def _check_tokenizer_folder(recipe: Recipe, folder: Path, force: bool) -> None:
    """Raise InputError if a trained tokenizer must not be saved in a folder; see `train_recipe_tokenizer`."""
    if folder.is_file():
        raise InputError(f"tokenizer: {folder} is a file; name a folder for the trained tokenizer")
    if (folder / "tokenizer.json").exists() and not force:  # written last; without it, the command was interrupted
        raise InputError(
            f"tokenizer: {folder} exists; add --force to train it again, or name another folder in the recipe"
        )
    digest = None
    if folder.exists():
        try:
            digest = Tokenizer.load(folder).digest
        except InputError as error:  # for example, another program has written a tokenizer.model
            if (folder / "tokenizer.model").exists() and not force:
                raise InputError(
                    f"{first_line(error)}; the file is not overwritten, so name another folder in `tokenizer`"
                ) from None
    if not force:
        return
    if other := next((path for path in sorted(folder.glob("*")) if not path.name.startswith(SAVED_FILES)), None):
        raise InputError(f"{other}: not a tokenizer's file, so {folder} is not replaced; name another folder")
    for manifest in (Path(recipe.data.store, "manifest.json"), RunDir.of_recipe(recipe).store_manifest_path):
        with translate_damage_errors(manifest):
            is_used = manifest.is_file() and read_json(manifest)["tokenizer"]["digest"] == digest
        if is_used:
            raise InputError(
                f"{manifest.parent}: made with the tokenizer in {folder}; delete it before you replace the tokenizer, "
                "or name another folder in `tokenizer`"
            )


def sample_texts(recipe: Recipe, sample_bytes: int, sample: dict[str, SourceSample] | None = None) -> Iterator[str]:
    """Yield about `sample_bytes` of training text, divided among the sources by weight.

    The same files always produce the same sample. The counts of each source are added to `sample`. Raises InputError if
    the files of a source contain no text to train on.
    """
    sample = {} if sample is None else sample
    sources = recipe.data.sources
    total_weight = sum(source.weight for source in sources.values())
    wanted = {name: sample_bytes * source.weight / total_weight for name, source in sources.items()}
    files = {name: _train_files(name, source) for name, source in sources.items()}
    chosen = {name: _choose_files(files[name], source, wanted[name]) for name, source in sources.items()}
    with Bar("reading a sample", sum(file.size for own in chosen.values() for file in own), BYTES) as bar:
        done = 0
        for name, source in sources.items():
            counts = sample[name] = SourceSample()
            fraction = min(1.0, wanted[name] / max(1, _text_bytes(chosen[name], source)))
            for file in chosen[name]:
                for text in _sample_file(file.path, source, fraction, recipe.data.validation_fraction, counts):
                    yield _counted(text, counts)
                done += file.size
                bar.show(done)
            if fraction and counts.usable_rows and not counts.documents:  # so few documents that none was selected
                every = (
                    _sample_file(file.path, source, 1.0, recipe.data.validation_fraction, SourceSample())
                    for file in chosen[name]
                )
                for text in islice(chain.from_iterable(every), 1):
                    yield _counted(text[: int(wanted[name])], counts)
            if not counts.usable_rows or (fraction and not counts.documents):
                where = f" in {len(chosen[name]):,} of {len(files[name]):,} files" * (chosen[name] != files[name])
                raise counts.error(name, source, where)


def _train_files(name: str, source: Source) -> list[InputFile]:
    return [file for file in list_files(name, source) if file.split == "train"]


def _text_bytes(files: Sequence[InputFile], source: Source) -> int:
    """Estimate the bytes of text in files from their sizes."""
    kinds = [(file.size, compression_of(file.path), file_kind(file.path, source.format)) for file in files]
    return sum(
        size * (_COMPRESSION_RATIO if packed or kind in ("parquet", "arrow") else 1) for size, packed, kind in kinds
    )


def _choose_files(files: list[InputFile], source: Source, wanted_bytes: float) -> list[InputFile]:
    """Return evenly spaced files with about `wanted_bytes` of text or more: at least _MIN_FILES, or all files."""
    count = max(_MIN_FILES, len(files) * wanted_bytes / max(1, _text_bytes(files, source)))
    return files[:: max(1, int(len(files) / count))]


def _counted(text: str, counts: SourceSample) -> str:
    """Add a document to the counts, and return it."""
    counts.documents += 1
    counts.text_bytes += sum(map(len, iter_utf8_chunks(text)))
    return text


def _sample_file(
    path: str, source: Source, fraction: float, validation_fraction: float, counts: SourceSample
) -> Iterator[str]:
    """Yield the training documents of a file that are selected for the sample, and count the rows in `counts`.

    The hash of a selected document is in a range of length `fraction`, which begins where validation's range ends.
    """
    has_tail = source.holdout == "tail"
    start = 0.0 if has_tail else validation_fraction
    for row in read_rows(path, source):
        if isinstance(row, RejectedRow):
            counts.add_rejected(row)
            continue
        counts.usable_rows += 1
        position = hash_to_unit_interval(row.text)
        if position < start:
            counts.unused[HELD_OUT] += 1
        elif position < start + fraction:
            yield to_str(split_tail(row.text, validation_fraction)[0] if has_tail else row.text)


def first_document(name: str, source: Source, files: Sequence[InputFile]) -> tuple[str, SourceRow]:
    """Return the path of the first file with a usable row, and this row.

    At most _MAX_SEARCHED_ROWS rows are read. Raises InputError if none of them is usable, or if a file is unreadable.
    """
    counts, rows = SourceSample(), ((file.path, row) for file in files for row in read_rows(file.path, source))
    for path, row in islice(rows, _MAX_SEARCHED_ROWS):
        if isinstance(row, SourceRow):
            return path, row
        counts.add_rejected(row)
    raise counts.error(name, source, " in the first rows" * (counts.unused.total() == _MAX_SEARCHED_ROWS))
