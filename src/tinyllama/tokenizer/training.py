"""Training of a Llama 2-style or a byte-level tokenizer on documents.

SentencePiece trains the Llama 2-style tokenizer. Like Llama 2's tokens, the trained tokens do not mix letters, digits
and punctuation. Training a vocabulary of 8,192 tokens on 22 MB of text takes 5 s on one core. After training, tokens
that consist of spaces get Llama 2's score of -1e9. An indented `return` thus becomes a run of spaces and the token
`▁return`, which is the same in prose and code. `tokenizers` trains the byte-level tokenizer, which splits a text like
Llama 3's.
"""

import hashlib
import heapq
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import tokenizers
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tinyllama.errors import InputError
from tinyllama.progress import Bar
from tinyllama.recipe import TokenizerKind
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from tinyllama.tokenizer.byte_level import BOS, EOS, byte_level_json
from tinyllama.tokenizer.conversion import BYTES, SPACE, edge_case_texts
from tinyllama.tokenizer.encoder import iter_utf8_chunks_strict

TRAINING_CHARACTERS = 20_000_000
EXCERPT_CHARACTERS = 100_000
CHECKED_LINES = 2_000
CHECKED_CHARACTERS = 1_000_000
SPACES_SCORE = -1e9
_NAME = "the trained tokenizer"
RESERVED = "\u2585"
"""Character that SentencePiece's trainer uses for unknown characters; it silently drops lines with this character."""
# Newlines, tabs and other control characters are encoded as bytes, as in Llama 2. Lines are also split before the last
# space of a run, so that this space belongs to the next word, as in encoding. Otherwise an indentation of four spaces
# would become one token, and `return` would lose its leading space.
_LINE_ENDS = re.compile(rf"[\x00-\x1f\x7f{RESERVED}]+|(?<= )(?= [^ ])")


@dataclass(frozen=True)
class TrainingText:
    """The texts that a tokenizer is trained on."""

    lines: list[str]
    """Parts of the documents: lines for the kind `llama2`, longer excerpts for `bytelevel`."""
    unused: dict[str, int]
    """Number of unused characters of the documents, by reason; reasons with a count of 0 are absent."""
    kind: TokenizerKind = "llama2"
    """Kind of the tokenizer."""

    @property
    def num_characters(self) -> int:
        """Number of characters in all lines."""
        return sum(map(len, self.lines))

    def __str__(self) -> str:
        """Return one line with the numbers of used and unused characters."""
        unused = ", ".join(f"{count:,} {reason}" for reason, count in self.unused.items())
        return f"trained on {self.num_characters:,} characters" + (f"; not used: {unused}" if unused else "")


def training_text(
    texts: Iterable[str], num_characters: int = TRAINING_CHARACTERS, kind: TokenizerKind = "llama2"
) -> TrainingText:
    """Sample the documents, and count the unused characters; for `llama2`, split the sample into SentencePiece's lines.

    The sample does not depend on the order of the documents.
    """
    seen = 0

    def count_characters() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    excerpts = sample_excerpts(count_characters(), num_characters)
    lines, counts = excerpts, {f"beyond the sample of {num_characters:,}": seen - sum(map(len, excerpts))}
    if kind == "llama2":
        lines = [line for excerpt in excerpts for line in _LINE_ENDS.split(excerpt) if line]
        reserved = sum(excerpt.count(RESERVED) for excerpt in excerpts)
        counts |= {
            "control characters": sum(map(len, excerpts)) - sum(map(len, lines)) - reserved,
            "of U+2585, which SentencePiece reserves": reserved,
        }
    return TrainingText(lines, {reason: count for reason, count in counts.items() if count}, kind)


def train_tokenizer(text: TrainingText, vocab_size: int) -> Tokenizer:
    """Train a BPE of `vocab_size` tokens, of the kind that the text was made for.

    In a Llama 2-style vocabulary, ids 0, 1 and 2 are <unk>, <s> and </s>, and the next 256 ids are the bytes. In a
    byte-level vocabulary, the first 256 ids are the bytes, and the last two are BOS and EOS. Raises InputError if there
    is no text, or too little text for `vocab_size` tokens.
    """
    if not any(text.lines):
        raise InputError("tokenizer training: the texts are empty; give documents that contain words")
    with Bar("training the tokenizer", vocab_size, "tokens", rate="") as bar:
        bar.show(0, f"from {text.num_characters:,} characters")
        train = _train_llama_style if text.kind == "llama2" else _train_byte_level
        tokenizer = train(text.lines, vocab_size)
        bar.show(vocab_size)
    _check_decoding(tokenizer, text)
    return tokenizer


def _train_llama_style(lines: list[str], vocab_size: int) -> Tokenizer:
    model = None
    with suppress(InputError):  # the second call of _train raises the same error, with the correct limit
        model = _train(lines, vocab_size)
    if model is None or not any(piece.piece == SPACE for piece in model.pieces):
        # SentencePiece drops rare characters; the option required_chars keeps the space
        model = _train(lines, vocab_size, required_chars=SPACE)
    for piece in model.pieces:
        if not piece.piece.strip(SPACE):
            piece.score = SPACES_SCORE
    model.normalizer_spec.add_dummy_prefix = True
    return Tokenizer(SentencePieceBackend(_NAME, model.SerializeToString()))


def _train_byte_level(texts: list[str], vocab_size: int) -> Tokenizer:
    special = (BOS, EOS)
    if vocab_size < (needed := len(BYTES) + len(special)):
        reason = f"the bytes and special tokens alone need {needed}; raise the vocabulary size"
        raise _training_error(texts, vocab_size, reason)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not survive the fork of prepare's workers
    model = tokenizers.Tokenizer.from_str(json.dumps(byte_level_json([], [])))
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    trained = json.loads(model.to_str())["model"]
    if (size := len(trained["vocab"]) + len(special)) < vocab_size:
        reason = f"the texts contain too few different words; use a vocabulary size of at most {size}"
        raise _training_error(texts, vocab_size, reason)
    document = byte_level_json(sorted(trained["vocab"], key=trained["vocab"].get), trained["merges"])
    return Tokenizer(HuggingFaceBackend(_NAME, document, {"bos_token": BOS, "eos_token": EOS}))


def _check_decoding(tokenizer: Tokenizer, trained_on: TrainingText) -> None:
    """Check that decoding the encoded text restores it, for a part of the training text and the edge cases.

    For a Llama 2-style tokenizer, each U+2581 is first replaced by a space. Raises InputError if a text changes.
    """
    tokens = [token.decode(errors="ignore") for token in tokenizer.token_bytes()]
    part = "\n".join(trained_on.lines[:CHECKED_LINES])[:CHECKED_CHARACTERS]
    for text in (*edge_case_texts(tokens), part):
        spaced = text.replace(SPACE, " ") if trained_on.kind == "llama2" else text
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
        raise _training_error(lines, vocab_size, reason) from None
    return ModelProto.FromString(model.getvalue())


def _training_error(texts: list[str], vocab_size: int, reason: str) -> InputError:
    size = sum(map(len, texts))
    return InputError(f"tokenizer training: {vocab_size} tokens from {size:,} characters: {reason}")
