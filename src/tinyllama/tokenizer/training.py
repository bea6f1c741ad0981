"""Training of a Llama-style tokenizer on documents.

SentencePiece trains the tokenizer. Like Llama 2's tokens, the trained tokens do not mix letters, digits and
punctuation. Training a vocabulary of 8,192 tokens on 22 MB of text takes 5 s on one core. After training, tokens that
consist of spaces get Llama 2's score of -1e9. An indented `return` thus becomes a run of spaces and the token
`▁return`, which is the same in prose and code.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tinyllama.errors import InputError
from tinyllama.progress import Bar
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import SentencePieceBackend
from tinyllama.tokenizer.conversion import SPACE, edge_case_texts
from tinyllama.tokenizer.encoder import iter_utf8_chunks_strict

TRAINING_CHARACTERS = 20_000_000
EXCERPT_CHARACTERS = 100_000
CHECKED_LINES = 2_000
SPACES_SCORE = -1e9
RESERVED = "\u2585"
"""Character that SentencePiece's trainer uses for unknown characters; it silently drops lines with this character."""
# Newlines, tabs and other control characters are encoded as bytes, as in Llama 2. Lines are also split before the last
# space of a run, so that this space belongs to the next word, as in encoding. Otherwise an indentation of four spaces
# would become one token, and `return` would lose its leading space.
_LINE_ENDS = re.compile(rf"[\x00-\x1f\x7f{RESERVED}]+|(?<= )(?= [^ ])")


@dataclass(frozen=True)
class TrainingText:
    """The lines that a tokenizer is trained on."""

    lines: list[str]
    unused: dict[str, int]
    """Number of unused characters of the documents, by reason; reasons with a count of 0 are absent."""

    @property
    def num_characters(self) -> int:
        """Number of characters in all lines."""
        return sum(map(len, self.lines))

    def __str__(self) -> str:
        """Return one line with the numbers of used and unused characters."""
        unused = ", ".join(f"{count:,} {reason}" for reason, count in self.unused.items())
        return f"trained on {self.num_characters:,} characters" + (f"; not used: {unused}" if unused else "")


def training_text(texts: Iterable[str], num_characters: int = TRAINING_CHARACTERS) -> TrainingText:
    """Sample the documents, split the sample into lines for SentencePiece, and count the unused characters.

    The sample does not depend on the order of the documents.
    """
    seen = 0

    def count_characters() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    excerpts = sample_excerpts(count_characters(), num_characters)
    lines = [line for excerpt in excerpts for line in _LINE_ENDS.split(excerpt) if line]
    sampled, reserved = sum(map(len, excerpts)), sum(excerpt.count(RESERVED) for excerpt in excerpts)
    counts = {
        f"beyond the sample of {num_characters:,}": seen - sampled,
        "control characters": sampled - sum(map(len, lines)) - reserved,
        "of U+2585, which SentencePiece reserves": reserved,
    }
    return TrainingText(lines, {reason: count for reason, count in counts.items() if count})


def train_tokenizer(text: TrainingText, vocab_size: int) -> Tokenizer:
    """Train a Llama-style BPE of `vocab_size` tokens.

    Ids 0, 1 and 2 are <unk>, <s> and </s>, and the next 256 ids are the bytes. Raises InputError if there is no text,
    or too little text for `vocab_size` tokens.
    """
    if not text.lines:
        raise InputError("tokenizer training: the texts are empty; give documents that contain words")
    with Bar("training the tokenizer", vocab_size, "tokens", rate="") as bar:
        bar.show(0, f"from {text.num_characters:,} characters")
        model = None
        with suppress(InputError):  # the second call of _train raises the same error, with the correct limit
            model = _train(text.lines, vocab_size)
        if model is None or not any(piece.piece == SPACE for piece in model.pieces):
            # SentencePiece drops rare characters; the option required_chars keeps the space
            model = _train(text.lines, vocab_size, required_chars=SPACE)
        bar.show(vocab_size)
    for piece in model.pieces:
        if not piece.piece.strip(SPACE):
            piece.score = SPACES_SCORE
    model.normalizer_spec.add_dummy_prefix = True
    tokenizer = Tokenizer(SentencePieceBackend("the trained tokenizer", model.SerializeToString()))
    _check_decoding(tokenizer, text.lines[:CHECKED_LINES])
    return tokenizer


def _check_decoding(tokenizer: Tokenizer, lines: list[str]) -> None:
    """Check that decoding the encoded text restores it, for the lines and the edge cases.

    Each U+2581 is first replaced by a space. Raises InputError if a text changes.
    """
    tokens = [token.decode(errors="ignore") for token in tokenizer.token_bytes()]
    for text in (*edge_case_texts(tokens), "\n".join(lines)):
        spaced = text.replace(SPACE, " ")
        if tokenizer.decode(tokenizer.encode(spaced)) != spaced:
            raise InputError(
                f"tokenizer training: the trained vocabulary changes the text {spaced[:40]!r}, so the tokenizer is not "
                "written; please report this with the text that you trained on"
            )


def sample_excerpts(texts: Iterable[str], num_characters: int) -> list[str]:
    """Return the excerpts with the lowest content hashes, up to a total of `num_characters` characters.

    The function reads the documents once, in any order, and uses constant memory.
    """
    kept: list[tuple[int, str]] = []  # a heap with the highest hash on top
    size = 0
    for text in texts:
        for start in range(0, len(text), EXCERPT_CHARACTERS):
            excerpt = text[start : start + EXCERPT_CHARACTERS]
            digest = hashlib.sha256(b"".join(iter_utf8_chunks_strict(excerpt, start=start))).digest()
            heapq.heappush(kept, (-int.from_bytes(digest), excerpt))
            size += len(excerpt)
            while size - len(kept[0][1]) >= num_characters:
                size -= len(heapq.heappop(kept)[1])
    return [excerpt for _, excerpt in sorted(kept)]


def _train(lines: list[str], vocab_size: int, **options: Any) -> ModelProto:
    """Train a model with SentencePiece; `options` are additional options of the trainer."""
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
            add_dummy_prefix=False,  # in encoding, only the first line of a document has the prefix
            normalization_rule_name="identity",
            max_sentence_length=4 * EXCERPT_CHARACTERS,
            num_threads=1,
            minloglevel=2,
            **options,  # not required_chars="", because the model would store the empty option
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rpartition("] ")[2].split())
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            reason = f"its characters, the bytes and special tokens alone need {needed[1]}; raise the vocabulary size"
        reason = re.sub(r"\. Please set it to a value <= (\d+)\.", r"; use a vocabulary size of at most \1", reason)
        size = sum(map(len, lines))
        raise InputError(f"tokenizer training: {vocab_size} tokens from {size:,} characters: {reason}") from None
    return ModelProto.FromString(model.getvalue())
