"""Train a tokenizer of Llama 2's kind on texts, or import one from a tokenizer.model.

SentencePiece trains, because its pieces keep letters, digits and punctuation apart as Llama 2's do, which the memo of
tokenizer.py lives on: 8,192 pieces from 22 MB take 5 s on one core. Pieces of spaces alone then get Llama 2's score
of -1e9, so that an indented `return` is a run of spaces and the piece `▁return` that prose and code share.
"""

import hashlib
import heapq
import io
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tinyllama.errors import InputError
from tinyllama.progress import Bar
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer_conversion import PIECES, SPACE, WITH_DUMMY_PREFIX, message_fields
from tinyllama.tokenizer_files import SentencePieceFile, checked_utf8_parts

TRAINING_CHARACTERS = 20_000_000
EXCERPT_CHARACTERS = 100_000
SPACES_SCORE = -1e9
# Newlines, tabs and their like stay byte pieces, as in Llama 2. The last space of a run goes with the word after it,
# as it will in use: trained together, four spaces of an indentation would become one piece and leave `return` bare.
_LINE_ENDS = re.compile(r"[\x00-\x1f\x7f]+|(?<= )(?= [^ ])")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a Llama-style BPE of `vocab_size` pieces on a sample of 20 million characters.

    Ids 0, 1 and 2 are <unk>, <s> and </s>, the next 256 the bytes. The same texts, in any order, give the same bytes.
    Raises InputError where there is no text, or not enough of it for that many pieces.
    """
    lines = [line for text in sample_texts(texts) for line in _LINE_ENDS.split(text) if line]
    if not lines:
        raise InputError("tokenizer training: the texts are empty; give documents with words in them")
    with Bar("training the tokenizer", vocab_size, "pieces", rate="") as bar:
        bar.show(0, f"from {sum(map(len, lines)):,} characters")
        model = _spaces_last(_train(lines, vocab_size))
        bar.show(vocab_size)
    return Tokenizer(SentencePieceFile("the trained tokenizer", model))


def import_tokenizer(source: str | Path, directory: str | Path) -> None:
    """Convert a tokenizer.model, proved equal to SentencePiece, and write the folder that `Tokenizer.save` writes.

    Raises InputError where the source is no tokenizer or has no equivalent tokenizer.json.
    """
    Tokenizer.load(source).save(directory)


def sample_texts(texts: Iterable[str], num_characters: int = TRAINING_CHARACTERS) -> list[str]:
    """Excerpts of the lowest content hash that hold `num_characters`: one pass, flat memory, whatever the order."""
    kept: list[tuple[int, str]] = []  # a heap with the highest hash on top
    held = 0
    for text in texts:
        for start in range(0, len(text), EXCERPT_CHARACTERS):
            excerpt = text[start : start + EXCERPT_CHARACTERS]
            digest = hashlib.sha256(b"".join(checked_utf8_parts(excerpt, start=start))).digest()
            heapq.heappush(kept, (-int.from_bytes(digest), excerpt))
            held += len(excerpt)
            while held - len(kept[0][1]) >= num_characters:
                held -= len(heapq.heappop(kept)[1])
    return [excerpt for _, excerpt in sorted(kept)]


def _train(lines: list[str], vocab_size: int) -> bytes:
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
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rpartition("] ")[2].split())
        if needed := re.search(
            r"required_chars\. \d+ vs (\d+)", reason
        ):  # whose own advice is an option of SentencePiece
            reason = f"its characters, the bytes and special tokens alone take {needed[1]}; raise the vocabulary size"
        size = sum(map(len, lines))
        raise InputError(f"tokenizer training: {vocab_size} pieces from {size:,} characters: {reason}") from None
    return model.getvalue()


def _spaces_last(model: bytes) -> bytes:
    """The model with Llama 2's score for pieces of spaces alone, and with its dummy prefix."""
    score = b"\x15" + struct.pack("<f", SPACES_SCORE)
    changed = b"".join(
        _message(number, value + score if number == PIECES and _is_spaces(value) else value)
        for number, value in message_fields(model)
    )
    # loading and writing leaves one value of each field
    written: bytes = SentencePieceProcessor(model_proto=changed + WITH_DUMMY_PREFIX).serialized_model_proto()
    return written


def _is_spaces(piece: bytes) -> bool:
    text: bytes = dict(message_fields(piece))[1]
    return not text.decode().strip(SPACE)


def _message(number: int, value: bytes) -> bytes:
    """A protobuf field that holds bytes: its key, its length in groups of 7 bits, and the bytes."""
    length = len(value)
    head = bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + value
