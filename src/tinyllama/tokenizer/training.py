"""Train a tokenizer of Llama 2's kind on texts, or import one from a tokenizer.model.

SentencePiece trains, because its pieces keep letters, digits and punctuation apart as Llama 2's do, which
`tokenizer.memo` relies on: 8,192 pieces from 22 MB take 5 s on one core. Pieces of spaces alone then get Llama 2's
score of -1e9, so that an indented `return` is a run of spaces and the piece `▁return` that prose and code share.
"""

import hashlib
import heapq
import io
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tinyllama.errors import InputError
from tinyllama.progress import Bar
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import SentencePieceBackend, iter_utf8_chunks_strict
from tinyllama.tokenizer.conversion import (
    PIECES,
    SPACE,
    WITH_DUMMY_PREFIX,
    edge_case_texts,
    message_fields,
    parse_model,
    write_field,
)

TRAINING_CHARACTERS = 20_000_000
EXCERPT_CHARACTERS = 100_000
CHECKED_LINES = 2_000
SPACES_SCORE = -1e9
# SentencePiece drops every line that holds this character, without an error: its trainer uses it for what is unknown.
RESERVED = "\u2585"
# Newlines, tabs and their like stay byte pieces, as in Llama 2. The last space of a run goes with the word after it,
# as it will in use: trained together, four spaces of an indentation would become one piece and leave `return` bare.
_LINE_ENDS = re.compile(rf"[\x00-\x1f\x7f{RESERVED}]+|(?<= )(?= [^ ])")


@dataclass(frozen=True)
class TrainingText:
    """The lines that a tokenizer is trained on."""

    lines: list[str]
    not_used: dict[str, int]
    """Number of characters of the texts that are in no line, by kind; kinds without any are absent."""

    @property
    def num_characters(self) -> int:
        """Number of characters in all lines."""
        return sum(map(len, self.lines))

    def __str__(self) -> str:
        """Describe in one line what is used and what is not."""
        not_used = ", ".join(f"{count:,} {kind}" for kind, count in self.not_used.items())
        return f"trained on {self.num_characters:,} characters" + (f"; not used: {not_used}" if not_used else "")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a Llama-style BPE of `vocab_size` pieces on a sample of 20 million characters.

    Ids 0, 1 and 2 are <unk>, <s> and </s>, the next 256 the bytes. The same texts, in any order, give the same bytes.
    Raises InputError where there is no text, or not enough of it for that many pieces.
    """
    return train_on_lines(training_text(texts), vocab_size)


def training_text(texts: Iterable[str], num_characters: int = TRAINING_CHARACTERS) -> TrainingText:
    """Sample the texts, cut the sample into lines for SentencePiece, and count the characters that are in no line."""
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    excerpts = sample_texts(counted(), num_characters)
    lines = [line for excerpt in excerpts for line in _LINE_ENDS.split(excerpt) if line]
    held, reserved = sum(map(len, excerpts)), sum(excerpt.count(RESERVED) for excerpt in excerpts)
    counts = {
        f"beyond the sample of {num_characters:,}": seen - held,
        "control characters": held - sum(map(len, lines)) - reserved,
        "of U+2585, which SentencePiece reserves": reserved,
    }
    return TrainingText(lines, {kind: count for kind, count in counts.items() if count})


def train_on_lines(text: TrainingText, vocab_size: int) -> Tokenizer:
    """Train as `train_tokenizer` does, on text that is sampled and cut already."""
    if not text.lines:
        raise InputError("tokenizer training: the texts are empty; give documents with words in them")
    with Bar("training the tokenizer", vocab_size, "pieces", rate="") as bar:
        bar.show(0, f"from {text.num_characters:,} characters")
        model = _train(text.lines, vocab_size)
        if not any(piece.text == SPACE for piece in parse_model(model)[0]):
            # SentencePiece drops characters that are rare in the lines; its option required_chars keeps one
            model = _train(text.lines, vocab_size, required_chars=SPACE)
        bar.show(vocab_size)
    tokenizer = Tokenizer(SentencePieceBackend("the trained tokenizer", _demote_whitespace_pieces(model)))
    _check_decoding(tokenizer, text.lines[:CHECKED_LINES])
    return tokenizer


def _check_decoding(tokenizer: Tokenizer, lines: list[str]) -> None:
    """Raise InputError where a text without U+2581 does not decode to itself."""
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.piece_bytes()]
    for text in (*edge_case_texts(pieces), "\n".join(lines)):
        spaced = text.replace(SPACE, " ")
        if tokenizer.decode(tokenizer.encode(spaced)) != spaced:
            raise InputError(
                f"tokenizer training: the trained vocabulary does not decode {spaced[:40]!r} to itself, so it is not "
                "written; please report this with the text that you trained on"
            )


def convert_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Convert a tokenizer.model, proved equal to SentencePiece, and write the folder that `Tokenizer.save` writes.

    Raises InputError where the source is no tokenizer or has no equivalent tokenizer.json.
    """
    Tokenizer.load(source).save(directory)


def sample_texts(texts: Iterable[str], num_characters: int) -> list[str]:
    """Excerpts of the lowest content hash that hold `num_characters`: one pass, flat memory, whatever the order."""
    kept: list[tuple[int, str]] = []  # a heap with the highest hash on top
    held = 0
    for text in texts:
        for start in range(0, len(text), EXCERPT_CHARACTERS):
            excerpt = text[start : start + EXCERPT_CHARACTERS]
            digest = hashlib.sha256(b"".join(iter_utf8_chunks_strict(excerpt, start=start))).digest()
            heapq.heappush(kept, (-int.from_bytes(digest), excerpt))
            held += len(excerpt)
            while held - len(kept[0][1]) >= num_characters:
                held -= len(heapq.heappop(kept)[1])
    return [excerpt for _, excerpt in sorted(kept)]


def _train(lines: list[str], vocab_size: int, **options: Any) -> bytes:
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # in use, only the first line of a document has it
            normalization_rule_name="identity",
            max_sentence_length=4 * EXCERPT_CHARACTERS,
            num_threads=1,
            minloglevel=2,
            **options,  # the model keeps those that are given, even empty ones
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rpartition("] ")[2].split())
        if needed := re.search(
            r"required_chars\. \d+ vs (\d+)", reason
        ):  # whose own advice is an option of SentencePiece
            reason = f"its characters, the bytes and special tokens alone take {needed[1]}; raise the vocabulary size"
        reason = reason.replace("Please set it to a value", "Give --vocab-size a value")
        size = sum(map(len, lines))
        raise InputError(f"tokenizer training: {vocab_size} pieces from {size:,} characters: {reason}") from None
    return model.getvalue()


def _demote_whitespace_pieces(model: bytes) -> bytes:
    """The model with Llama 2's score for pieces of spaces alone, and with its dummy prefix."""
    score = b"\x15" + struct.pack("<f", SPACES_SCORE)
    changed = b"".join(
        write_field(number, value + score if number == PIECES and _is_spaces(value) else value)
        for number, value in message_fields(model)
    )
    # loading and writing leaves one value of each field
    written: bytes = SentencePieceProcessor(model_proto=changed + WITH_DUMMY_PREFIX).serialized_model_proto()
    return written


def _is_spaces(piece: bytes) -> bool:
    text: bytes = dict(message_fields(piece))[1]
    return not text.decode().strip(SPACE)
