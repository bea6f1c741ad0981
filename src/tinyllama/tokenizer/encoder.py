"""Encoding of documents by gigatoken, with the ids of the library that reads the tokenizer's file.

gigatoken caches the ids of words without a limit, and encoding a long word takes 20 bytes of memory per byte. A new
encoder therefore replaces one that has grown, and a long text is encoded in overlapping windows. The ids of two windows
are joined after a token that both have at the same place. The result equals the ids of the complete text: BPE always
merges the pair with the best rank, the leftmost one of several. A pair of neighbors in the complete text is also a pair
of neighbors in one of the two windows, as long as no merge crosses the ends of the common token. The best pair is then
also the best pair of this window, so the merge is the window's next merge, which does not cross these ends either.
"""

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from itertools import chain, count
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.errors import InputError, first_line, warn_once
from tinyllama.hardware import resident_memory_bytes
from tinyllama.text import TextLike, iter_utf8_chunks
from tinyllama.tokenizer.backends import Backend, HuggingFaceBackend
from tinyllama.tokenizer.byte_level import BYTE_LEVEL_STEP, DIGITS_STEP, known_pre_tokenizer, pre_tokenizer_steps
from tinyllama.tokenizer.conversion import BYTE_LEVEL, LLAMA_PIPELINE, SPACE, edge_case_texts, token_bytes
from tinyllama.tokenizer.cuts import UNASSIGNED, Cuts

TokenIds = npt.NDArray[np.unsignedinteger[Any]]

_SEPARATOR = b"\xff"  # never occurs in UTF-8

WINDOW = 1 << 20
"""Size of a window, without the overlap, in characters of a `str` or in bytes."""
OVERLAP = 1 << 11
"""Number of characters that two windows share."""
_SEARCHED = 1 << 14
"""Number of characters in which a place for the start or end of a window is searched for."""
_MARGIN_BYTES = 32
"""Number of bytes at the end of a window that do not contain the common token."""
_MAX_GROWTH = 200_000_000
"""Growth of this process's memory, in bytes, after which a new encoder replaces the present one."""
_CHECK_EVERY = 1 << 21
"""Number of characters between two checks of the memory."""
_CHECKED_TOKENS = 4_000
"""Maximum number of tokens whose ids are compared before the first text is encoded; the comparison takes 0.1 s."""


class Encoder:
    """Encoder of texts with gigatoken; `document` is a tokenizer.json that gigatoken supports."""

    def __init__(
        self, document: dict[str, Any], backend: Backend, window: int = WINDOW, overlap: int = OVERLAP
    ) -> None:
        self._window, self._overlap, self._encode_exactly = window, overlap, backend.encode
        self._num_unchecked, self._memory = 0, 0
        self._lengths = np.array([len(token_bytes(token)) for token in backend.tokens])
        self._is_llama_style = backend.is_llama_style
        self._prefix = " " if backend.is_llama_style else ""
        self._normalizer: Any = None
        if isinstance(backend, HuggingFaceBackend) and not backend.is_llama_style:
            # gigatoken's tables for NFC are of another version of Unicode
            self._normalizer, document = backend.tokenizer.normalizer, document | {"normalizer": None}
        self.added: list[str] = [token["content"] for token in document["added_tokens"]]
        self._longest_added = max(map(len, self.added), default=0)
        self._splits_digits = pre_tokenizer_steps(document)[:1] == [DIGITS_STEP]
        self._unknown_bytes: frozenset[int] = frozenset()
        if self._splits_digits:
            document = document | {"pre_tokenizer": BYTE_LEVEL_STEP}
        if not backend.is_llama_style:
            # SmolLM2's vocabulary lacks some bytes, but gigatoken requires an id for each of them
            model = document["model"]
            unknown = {character: byte for character, byte in BYTE_LEVEL.items() if character not in model["vocab"]}
            vocabulary = model["vocab"] | dict(zip(unknown, count(len(self._lengths)), strict=False))
            document = document | {"model": model | {"vocab": vocabulary}}
            self._unknown_bytes = frozenset(unknown.values())
        self._json = json.dumps(document)
        self._load()

    def encode(self, text: TextLike) -> Iterator[TokenIds]:
        """Yield the ids of a text in parts. Raises InputError for a lone surrogate."""
        num_ids = 0
        for part in self._encode_windows(text):
            if part is None:
                complete = b"".join(iter_utf8_chunks_strict(text)).decode()
                yield self._encode_window(self._prefix + complete)[num_ids:]
            else:
                num_ids += len(part)
                yield part

    def _encode_windows(self, text: TextLike) -> Iterator[TokenIds | None]:
        """Yield the ids of a text in parts; yield None instead of the last part if two windows cannot be joined."""
        chunks = iter_utf8_chunks_strict(text, self._window)
        chunk = next(chunks, None)
        rest, overlap, before = self._prefix, "", None
        while chunk is not None:
            window, chunk = rest + chunk.decode(), next(chunks, None)
            if self._is_llama_style:
                window = window.replace(SPACE, " ")
            end = len(window) if chunk is None else self._last_cut(window)
            ids = self._encode_window(window[:end])
            if before is not None:
                num_before, num_after = self._find_common_token(before, ids, overlap)
                if num_before == 0:
                    yield None
                    return
                yield before[:num_before]
                ids = ids[num_after:]
            if chunk is None:
                yield ids
            elif (start := self._find_start(window, end, ids)) == 0:
                yield None
                return
            else:
                rest, overlap, before = window[start:], window[start:end], ids

    def _last_cut(self, window: str) -> int:
        """Return the last place where a window may end so that the overlap before it is plain, or 0."""
        last, cuts = len(window) - self._longest_added, Cuts(window)
        for place in range(last, max(0, last - _SEARCHED), -1):
            if (self._is_llama_style or place in cuts) and self._is_plain(window, max(1, place - self._overlap), place):
                return place
        return 0

    def _find_start(self, window: str, end: int, ids: TokenIds) -> int:
        """Return the place in a window where the next window starts, which is the start of a token, or 0."""
        last, cuts = end - self._overlap, Cuts(window)
        distance = len(window[max(0, last) : end].encode())
        near_end = ids[-distance - 4 * _SEARCHED :]
        distances = set(np.cumsum(self._lengths[near_end[::-1]]).tolist())
        for place in range(last, max(0, last - _SEARCHED), -1):
            if distance in distances and (self._is_llama_style or place in cuts):
                return place if self._is_plain(window, place, end) else 0
            distance += len(window[place - 1].encode())
        return 0

    def _is_plain(self, window: str, start: int, end: int) -> bool:
        """Return whether the tokens of the overlap have its bytes, and no added token is near its ends."""
        surroundings = window[max(0, start - self._longest_added) : end + self._longest_added]
        return (
            self._unknown_bytes.isdisjoint(surroundings.encode())
            and not any(content in surroundings for content in self.added)
            and self._is_normalized(window[start - 1 : end + 1])
        )

    def _find_common_token(self, before: TokenIds, after: TokenIds, overlap: str) -> tuple[int, int]:
        """Return the number of ids of each window up to the end of the first common token, or (0, 0) without one.

        `before` ends with the overlap, and `after` starts with it.
        """
        num_bytes = len(overlap.encode())
        before, num_skipped = before[-num_bytes:], max(0, len(before) - num_bytes)
        after = after[:num_bytes]
        lengths, lengths_after = self._lengths[before], self._lengths[after]
        ends, ends_after = np.cumsum(lengths) - lengths.sum() + num_bytes, np.cumsum(lengths_after)
        is_inside = (ends >= lengths) & (ends <= num_bytes - _MARGIN_BYTES)
        # the end and the id of a token also determine its start
        keys = np.where(is_inside, ends << 32 | before, -1)
        _, places, places_after = np.intersect1d(keys, ends_after << 32 | after, return_indices=True)
        return (num_skipped + int(places[0]) + 1, int(places_after[0]) + 1) if len(places) else (0, 0)

    def _encode_window(self, text: str) -> TokenIds:
        self._num_unchecked += len(text)
        if self._num_unchecked > _CHECK_EVERY:
            self._num_unchecked = 0
            if resident_memory_bytes() > self._memory + _MAX_GROWTH:
                self._load()
        if not (self._is_llama_style or _is_assigned(text)):
            return np.array(self._encode_exactly(text), np.uint32)
        if not self._is_normalized(text):
            if any(content in text for content in self.added):  # found before the text is normalized
                return np.array(self._encode_exactly(text), np.uint32)
            text = self._normalizer.normalize_str(text)
        ids: TokenIds = (self._encode_with_digits if self._splits_digits else self._gigatoken.encode)(text)
        if self._unknown_bytes and ids.max(initial=0) >= len(self._lengths):
            return np.array(self._encode_exactly(text), np.uint32)
        return ids

    def _is_normalized(self, text: str) -> bool:
        """Return whether the tokenizer's normalizer certainly keeps a text as it is."""
        return (
            self._normalizer is None
            or text.isascii()
            or (unicodedata.is_normalized("NFC", text) and _is_assigned(text))
        )

    def _encode_with_digits(self, text: str) -> TokenIds:
        """Encode a text as its digits and the parts between them, which gigatoken splits into pretokens by itself."""
        from gigatoken import BytesSource  # noqa: PLC0415

        data = text.encode()
        for character in set(text):
            if unicodedata.category(character)[0] == "N":
                data = data.replace(character.encode(), _SEPARATOR + character.encode() + _SEPARATOR)
        parts = self._gigatoken.encode_batch_list(BytesSource(data, _SEPARATOR), parallel=False)
        return np.fromiter(chain.from_iterable(parts), np.uint32)

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json  # noqa: PLC0415 - a machine that only trains may lack it

        self._gigatoken: Any = None  # frees the memory of the present encoder first
        self._gigatoken = load_hf_json(self._json)
        self._num_unchecked, self._memory = 0, resident_memory_bytes()


def _is_assigned(text: str) -> bool:
    """Return whether Python knows all characters of a text; other versions of Unicode may classify an unknown one."""
    return text.isascii() or UNASSIGNED not in map(unicodedata.category, set(text))


def create_encoder(backend: Backend) -> Encoder | None:
    """Return an encoder with the ids of `backend.encode`, or None, with a warning, if gigatoken cannot give these ids.

    The ids are compared for tokens in random order, special and added tokens, and edge cases of Unicode.
    """
    try:
        if (document := supported_document(backend)) is None:
            reason = "gigatoken does not support it"
        elif _has_exact_ids(encoder := Encoder(document, backend), backend):
            return encoder
        else:
            reason = "the ids of gigatoken differ"
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
    except BaseException as error:
        # pyo3 does not export PanicException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"gigatoken fails: {first_line(error)}"
    library = "tokenizers" if isinstance(backend, HuggingFaceBackend) else "sentencepiece"
    warn_once(f"{backend.name}: {library} encodes the documents, several times more slowly ({reason})")
    return None


def _has_exact_ids(encoder: Encoder, backend: Backend) -> bool:
    tokens = backend.tokens
    names = [token.text for token in tokens if token.type == "special"] + encoder.added
    texts = [token_bytes(token).decode(errors="ignore") for token in tokens if token.type != "byte"]
    sample = random.Random(0).sample(texts, min(len(texts), _CHECKED_TOKENS))
    # Llama-style tokenizers do not split text by classes of characters.
    classified = [] if backend.is_llama_style else [_classified_characters(texts)]
    for text in (*edge_case_texts(sample), "a".join(names), " ".join(names), *classified):
        if np.concatenate([*encoder.encode(text), np.empty(0, np.uint32)]).tolist() != backend.encode(text):
            return False
    return True


def _classified_characters(tokens: list[str]) -> str:
    """Return assigned characters of all scripts, each before a token such as `.e`, whose ids depend on the character.

    After a letter, the pre-tokenizer of Llama 3 splits off `.e` as one word. After punctuation, it does not. Two
    libraries that classify a character differently therefore give different ids.
    """
    token = next((token for token in tokens if re.fullmatch(r"[!-/][a-z]+", token)), ".e")
    codes = chain(range(0x80, 0xD800, 7), range(0xE000, 0x34000, 7))  # letters have no higher code points in Unicode 17
    return token.join(character for character in map(chr, codes) if _is_assigned(character))


def supported_document(backend: Backend) -> dict[str, Any] | None:
    """Return a tokenizer.json without special tokens, which gigatoken would recognize in a text, or None.

    The encoder adds the prefix of Llama's tokenizers, because only the first window of a text has it.
    """
    document = backend.document | {"post_processor": None}
    if backend.is_llama_style:
        replace = LLAMA_PIPELINE["normalizer"]["normalizers"][1]
        return document | {"added_tokens": [], "normalizer": replace}
    if not isinstance(backend, HuggingFaceBackend) or not backend.is_byte_level:
        return None
    added = [token for token in backend.added if not token.get("special")]
    model, normalizer = document["model"], document.get("normalizer")
    changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    is_supported = (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in changes)
        and normalizer in (None, {"type": "NFC"})
        and known_pre_tokenizer(document) is not None
        and not any(token.get(key) for token in added for key in ("single_word", "lstrip", "rstrip", "normalized"))
    )
    return document | {"added_tokens": added, "normalizer": normalizer} if is_supported else None


def iter_utf8_chunks_strict(text: TextLike, size: int = 1 << 20, start: int = 0) -> Iterator[bytes]:
    """Yield a part of a text as UTF-8 in chunks, like `iter_utf8_chunks`, but reject lone surrogates.

    `start` is the position of the part in the complete text. If the part contains a lone surrogate, raises InputError
    with the position of the surrogate in the complete text.
    """
    try:
        for part in iter_utf8_chunks(text, size):
            yield part
            start += size
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: lone surrogate U+{ord(error.object[error.start]):04X} at character {start + error.start}; "
            "remove it, or replace it by U+FFFD"
        ) from None
