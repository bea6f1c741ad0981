"""Exact encoding with a cache of short runs of text; one numpy operation looks up all runs in a block of text.

A split between two characters does not change the tokens if no vocabulary entry contains these characters next to each
other, because no BPE merge then crosses the split. The encoder finds the kinds of characters that are adjacent in any
token, and splits text between all other pairs of kinds. The runs between the splits are short and repeat often.
docs/benchmarks.md compares the speed with that of SentencePiece.
"""

import string
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.text import TextLike
from tinyllama.tokenizer.backends import iter_utf8_chunks_strict
from tinyllama.tokenizer.conversion import SPACE

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]
TokenIds = npt.NDArray[np.unsignedinteger[Any]]

# The kind of a byte is the index in KINDS of the string that contains it, or one of the three constants below KINDS.
KINDS = (" ", string.ascii_letters, string.digits, "\n", "\t", string.punctuation)
CONTROL, BEYOND_ASCII, BETWEEN_PIECES = len(KINDS), len(KINDS) + 1, len(KINDS) + 2
NEWLINE = KINDS.index("\n")
NEVER = 0xFF  # a byte that never occurs in UTF-8
END = bytes([NEVER])  # follows each text, as a separate run; belongs to no token

# If a run consists of at most 254 spaces and a word of at most 15 bytes, its key is two 64-bit numbers, which numpy
# looks up in a table of slots. Other runs are looked up in a Python dict.
KEY_BYTES, KEY_SPACES = 15, 254
RUN_BYTES = 110  # memory per cached run, in addition to the run's own bytes
RUNS_A_CALL = 64  # runs per call of the library; more runs per call are not faster


class Limits(NamedTuple):
    """Limits of the memory that the memo uses; the limits do not change the ids."""

    memo_bytes: int = 64_000_000
    """Maximum memory for cached runs, in bytes. The default is enough for 500,000 runs; 150 MB of code have 330,000.

    The table of slots takes another 13 MB.
    """
    slot_bits: int = 19
    """Base-2 logarithm of the number of slots in numpy's table; runs without a slot are looked up in Python."""
    long_run_bytes: int = 1 << 12
    """Size in bytes above which a run, such as Chinese text, is also split between characters that no token joins."""
    block_bytes: int = 1 << 17
    """Size of a block in bytes. Short texts are joined, and long texts are split. A block fits into the CPU cache."""


DEFAULT_LIMITS = Limits()


def kind_of_bytes() -> bytes:
    """Return the kind of each byte value, as a table for bytes.translate."""
    kinds = {ord(character): kind for kind, characters in enumerate(KINDS) for character in characters}
    beyond = dict.fromkeys(range(128, NEVER), BEYOND_ASCII) | {NEVER: BETWEEN_PIECES}
    return bytes((kinds | beyond).get(byte, CONTROL) for byte in range(256))


def adjacency_matrix(pieces: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Return a matrix [before, after], true if a byte of kind `before` precedes one of kind `after` in any token."""
    text = bytes([NEVER]).join(piece.replace(SPACE, " ").encode() for piece in pieces)
    kinds = np.frombuffer(text.translate(kind_of_bytes()), np.uint8)
    found = np.zeros((BETWEEN_PIECES + 1,) * 2, np.bool_)
    found[kinds[:-1], kinds[1:]] = True
    found[BEYOND_ASCII, BEYOND_ASCII] = True  # no split inside a character
    return found[:BETWEEN_PIECES, :BETWEEN_PIECES]


def splits_before_spaces(together: npt.NDArray[np.bool_]) -> bool:
    """Return whether text can be split before spaces: no token may have a space after another character."""
    return not together[1:, 0].any()


def mergeable_character_pairs(pieces: list[str]) -> Bits:
    """Return the pairs of adjacent characters in tokens, encoded as numbers, in a sorted and never empty array."""
    characters = np.frombuffer("".join(pieces).replace(SPACE, " ").encode("utf-32-le"), np.uint32)
    last = np.cumsum([len(piece) for piece in pieces])[:-1] - 1
    return np.unique(np.append(np.delete(_pairs(characters), last), np.uint64(0)))


def _pairs(characters: npt.NDArray[np.uint32]) -> Bits:
    return characters[:-1].astype(np.uint64) << np.uint64(32) | characters[1:]


def newline_is_isolated(together: npt.NDArray[np.bool_]) -> bool:
    """Return whether newlines can separate runs: no token may contain a newline next to another character."""
    others = np.arange(len(together)) != NEWLINE
    return not (together[NEWLINE, others].any() or together[others, NEWLINE].any())


class RunMemo:
    """Encoder that caches the ids of runs, in bounded memory; the ids do not depend on the contents of the cache.

    `encode_runs` encodes a list of runs exactly but slowly, without a dummy prefix. A full cache is cleared.
    """

    def __init__(
        self,
        pieces: Iterable[str],
        encode_runs: Callable[[list[str]], list[list[int]]],
        dtype: np.dtype[np.unsignedinteger[Any]],
        limits: Limits,
    ) -> None:
        self._encode_runs, self._dtype, self._limits = encode_runs, dtype, limits
        pieces = list(pieces)
        together, self._joined = adjacency_matrix(pieces), mergeable_character_pairs(pieces)
        kinds = kind_of_bytes()
        follows = [0] + [sum(1 << after - 1 for after in np.flatnonzero(row[1:]) + 1) for row in together[1:]]
        self._before = bytes(0 if byte == NEVER else follows[kinds[byte]] for byte in range(256))
        self._after = bytes(0 if byte == NEVER or kinds[byte] == 0 else 1 << kinds[byte] - 1 for byte in range(256))
        newline = encode_runs(["\n"])[0]
        self._newline = newline[0] if len(newline) == 1 and newline_is_isolated(together) else None
        self._forget()

    def encode(self, texts: Iterable[TextLike]) -> Iterator[list[TokenIds]]:
        """Yield a list of arrays per text, which together contain the ids of the text with its dummy prefix.

        Up to one block of text is read before the first ids are yielded.
        """
        parts: list[TokenIds] = []
        for data, starts, ends in self._blocks(texts):
            ids, stops = self._look_up(data, starts, ends)
            text_ends = np.flatnonzero(np.frombuffer(data, np.uint8) == NEVER)
            done = 0
            for stop in stops[np.searchsorted(starts, text_ends)].tolist():
                yield [*parts, ids[done:stop]]
                parts, done = [], stop
            if done < len(ids):
                parts.append(ids[done:])

    def _blocks(self, texts: Iterable[TextLike]) -> Iterator[tuple[bytes, Ints, Ints]]:
        """Yield the texts as UTF-8 in blocks of complete runs, with the starts and ends of the runs' words.

        The last run of a block is moved to the next block, because the run may continue in the text that follows.
        """
        parts, size, rest = [b""], 0, b""
        for part in _parts(texts, self._limits.block_bytes):
            parts.append(part)
            size += len(part)
            if size > max(self._limits.block_bytes, len(rest)):
                data = b"".join(parts)
                starts, ends = self._find_runs(data)
                if data[-1] != NEVER:
                    starts, ends = starts[:-1], ends[:-1]
                complete = int(ends[-1]) if len(ends) else 0
                rest = data[complete:]
                parts, size = [rest], 0
                if complete:
                    yield data[:complete], starts, ends
        if data := b"".join(parts):
            yield data, *self._find_runs(data)

    def _find_runs(self, data: bytes) -> tuple[Ints, Ints]:
        """Return the starts and ends of the runs' words. A run consists of a word and the spaces before it."""
        is_word = np.frombuffer(data, np.uint8) != ord(" ")
        before = np.frombuffer(data.translate(self._before), np.uint8)
        after = np.frombuffer(data.translate(self._after), np.uint8)
        edge = np.ones(len(data) + 1, np.bool_)
        np.equal(before[:-1] & after[1:], 0, out=edge[1:-1])
        starts, ends = np.flatnonzero(edge[:-1] & is_word), np.flatnonzero(edge[1:] & is_word) + 1
        long_runs = np.flatnonzero(ends - starts > self._limits.long_run_bytes).tolist()
        if not long_runs:
            return starts, ends
        cuts = np.concatenate([starts[run] + self._safe_cuts(data[starts[run] : ends[run]]) for run in long_runs])
        return np.sort(np.append(starts, cuts)), np.sort(np.append(ends, cuts))

    def _safe_cuts(self, word: bytes) -> Ints:
        """Return the byte offsets in a word between two characters that are adjacent in no token."""
        characters = np.frombuffer(word.decode().encode("utf-32-le"), np.uint32)
        offsets = np.cumsum(1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000))[:-1]
        pairs = _pairs(characters)
        nearest = self._joined[np.searchsorted(self._joined[:-1], pairs)]
        cuts: Ints = offsets[nearest != pairs]
        return cuts

    def _look_up(self, data: bytes, starts: Ints, ends: Ints) -> tuple[TokenIds, Ints]:
        """Return the ids of all runs, concatenated, and the position at which each run's ids end."""
        if self._held_bytes > self._limits.memo_bytes:
            self._forget()
        begins = np.concatenate(([0], ends[:-1]))
        low, high, is_short = _keys(data, begins, starts, ends)
        slots = ((low * _MIX_LOW + high * _MIX_HIGH) >> np.uint64(64 - self._limits.slot_bits)).view(np.int64)
        codes = self._codes[slots]
        missed = np.flatnonzero((self._low[slots] != low) | (self._high[slots] != high) | ~is_short)
        if len(missed):
            codes[missed] = self._recall(data, begins[missed], ends[missed])
            kept = missed[is_short[missed]]
            # if several runs of a block have the same slot, all three arrays keep the last run
            self._low[slots[kept]], self._high[slots[kept]] = low[kept], high[kept]
            self._codes[slots[kept]] = codes[kept]
        return _gather(np.frombuffer(self._ids, self._dtype), codes)

    def _recall(self, data: bytes, begins: Ints, ends: Ints) -> Ints:
        """Return the codes (see `_forget`) of runs that are not in numpy's table; encode runs that are not cached."""
        runs = [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        new = set(runs).difference(self._known)
        if new:
            parted = [] if self._newline is None else [run for run in new if b"\n" not in run]
            self._learn(parted, *self._encode_parted(parted))
            alone = list(new.difference(parted))
            self._learn(alone, *self._encode_alone(alone))
        return np.fromiter(map(self._known.__getitem__, runs), np.int64, len(runs))

    def _encode_parted(self, runs: list[bytes]) -> tuple[TokenIds, Ints]:
        """Return the ids of all runs, concatenated, and the number of ids of each run.

        Many runs are joined by newlines into one text, because the overhead of a library call is as large as the cost
        of encoding a run.
        """
        groups = (runs[first : first + RUNS_A_CALL] for first in range(0, len(runs), RUNS_A_CALL))
        texts = [b"\n".join((*group, b"")).replace(END, b"").decode() for group in groups]
        ids = np.fromiter(chain.from_iterable(self._encode_runs(texts)), self._dtype)
        is_newline = ids == self._newline
        return ids[~is_newline], np.diff(np.flatnonzero(is_newline), prepend=-1) - 1

    def _encode_alone(self, runs: list[bytes]) -> tuple[TokenIds, Ints]:
        """Return the same values as `_encode_parted`, but encode each run as a separate text."""
        encoded = self._encode_runs([run.replace(END, b"").decode() for run in runs])
        return np.fromiter(chain.from_iterable(encoded), self._dtype), np.array([*map(len, encoded)], np.int64)

    def _learn(self, runs: list[bytes], ids: TokenIds, counts: Ints) -> None:
        offsets = len(self._ids) + np.cumsum(counts) - counts
        self._ids.frombytes(ids.tobytes())
        self._known.update(zip(runs, (offsets << 32 | counts).tolist(), strict=True))
        self._held_bytes += sum(map(len, runs)) + RUN_BYTES * len(runs)

    def _forget(self) -> None:
        """Clear the cache. A run's code is the offset of its ids in `_ids`, times 2^32, plus the number of its ids."""
        self._known: dict[bytes, int] = {}
        self._ids = array("H" if self._dtype.itemsize == 2 else "I")
        self._low, self._high = np.zeros((2, 1 << self._limits.slot_bits), np.uint64)
        self._codes = np.zeros(1 << self._limits.slot_bits, np.int64)
        self._held_bytes = 0


def _parts(texts: Iterable[TextLike], size: int) -> Iterator[bytes]:
    """Yield each text as UTF-8 in parts, with the dummy prefix before the text and END after the text.

    A part has at most `size` characters if the text is a string, or at most `size` bytes if the text is bytes.
    """
    for text in texts:
        prefix = b" "
        for part in iter_utf8_chunks_strict(text, size):
            yield prefix + part.replace(SPACE.encode(), b" ")
            prefix = b""
        yield END


_TOP_BYTE = np.uint64(56)
# These odd constants, from the golden ratio and from xxHash, distribute the keys over the slots.
_MIX_LOW, _MIX_HIGH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_PADDING = np.array([[NEVER] * 16] * (KEY_BYTES + 1), np.uint8)
_PADDING[np.tri(KEY_BYTES + 1, 16, -1, np.bool_)] = 0
_PADDING_LOW, _PADDING_HIGH = _PADDING.view("<u8").T.copy()


def _keys(data: bytes, begins: Ints, starts: Ints, ends: Ints) -> tuple[Bits, Bits, npt.NDArray[np.bool_]]:
    """Return the low and high half of each run's key, and whether the run is short enough for a key.

    Different short runs have different keys. The word is in the lowest bytes of a key, and is followed by NEVER bytes.
    The highest byte encodes the number of spaces.
    """
    spaces, lengths = starts - begins, ends - starts
    is_short = (lengths <= KEY_BYTES) & (spaces <= KEY_SPACES)
    padded = data + bytes(15)
    eight_bytes, next_eight = (np.ndarray(len(data), "<u8", padded, offset, (1,)) for offset in (0, 8))
    low = eight_bytes[starts] | _PADDING_LOW.take(lengths, mode="clip")
    high = (next_eight[starts] | _PADDING_HIGH.take(lengths, mode="clip")) ^ (spaces.view(np.uint64) << _TOP_BYTE)
    return low, high, is_short


def _gather(ids: TokenIds, codes: Ints) -> tuple[TokenIds, Ints]:
    """Return the ids of all runs, concatenated, and the position at which each run's ids end."""
    counts, offsets = codes & 0xFFFFFFFF, codes >> 32
    stops = np.cumsum(counts)
    places = np.repeat(offsets - stops + counts, counts)
    places += np.arange(len(places))
    return ids[places], stops
