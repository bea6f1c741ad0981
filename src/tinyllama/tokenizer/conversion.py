"""From a tokenizer.model to the tokenizer.json of the same ids: pure functions over the contents of the two files.

SentencePiece joins the best-scored pair, a tokenizer.json lists its joins in order; so the joins are sorted by the
score of what they make. Pieces of spaces alone score -1e9 in Llama 2 and come last: transformers' own conversion puts
them elsewhere and is wrong wherever spaces repeat. Llama 2's 32,000 pieces give 61,249 joins in 0.1 s.
"""

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

SPACE = "▁"
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))

# the normaliser of Llama 2: in the words of tokenizer.model, and of tokenizer.json
LLAMA_NORMALISER = {"dummy_prefix": True, "extra_spaces_removed": False, "space_as_suffix": False, "rules": ""}
LLAMA_PIPELINE: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ],
    },
    "pre_tokenizer": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}

# GPT-2's way to write bytes as characters: printable ones as themselves, the others from U+0100 on, in order
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

# the numbers of sentencepiece_model.proto
PIECES, TRAINER, NORMALISER = 1, 2, 3
NORMAL = 1
# appended to a model, since the last value of a field is the one that counts
WITH_DUMMY_PREFIX, WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"
_FIXED_LENGTHS = {1: 8, 5: 4}  # by wire type
KINDS = {NORMAL: "text", 2: "special", 3: "special", 4: "user", 5: "unused", 6: "byte"}


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; `kind` is one of the values of KINDS."""

    text: str
    score: float
    kind: str


def parse_model(model: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """Pieces, trainer and normaliser (by field number) of a tokenizer.model that SentencePiece has found whole."""
    pieces: list[Piece] = []
    specifications: dict[int, dict[int, Any]] = {TRAINER: {}, NORMALISER: {}}
    for number, value in message_fields(model):
        if number == PIECES:
            fields = dict(message_fields(value))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            pieces.append(Piece(fields[1].decode(), score, KINDS[fields.get(3, NORMAL)]))
        elif number in specifications:
            specifications[number].update(message_fields(value))
    return pieces, specifications[TRAINER], specifications[NORMALISER]


def message_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: an int for a varint, else bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
        else:
            fixed = _FIXED_LENGTHS.get(key & 7)
            length, position = (fixed, position) if fixed else _varint(message, position)
            yield key >> 3, message[position : position + length]
            position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    if message[position] < 128:  # almost always
        return message[position], position + 1
    value = shift = 0
    while message[position] > 127:
        value |= (message[position] & 127) << shift
        shift += 7
        position += 1
    return value | message[position] << shift, position + 1


def write_field(number: int, value: bytes) -> bytes:
    """A protobuf field that holds bytes: its key, its length in groups of 7 bits, and the bytes."""
    length = len(value)
    head = bytearray([number << 3 | 2])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + value


def merges_by_score(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which SentencePiece joins them.

    Of equal scores SentencePiece takes the leftmost pair; in a run of spaces that grows one piece to its longest
    before the next begins, which the order says as: longest results first.
    """
    ordered = sorted(
        (piece for piece in pieces if piece.kind == "text"), key=lambda piece: (-piece.score, -len(piece.text))
    )
    texts = {piece.text for piece in ordered}
    return [
        (text[:cut], text[cut:])
        for text, _, _ in ordered
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in texts and text[cut:] in texts
    ]


def convert_pieces(pieces: list[Piece], unk: str | None, bos: str | None) -> dict[str, Any]:
    """The tokenizer.json of a Llama-style tokenizer.model: ids are positions in `pieces`."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(pieces)},
        "merges": [" ".join(merge) for merge in merges_by_score(pieces)],
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": number, "content": piece.text, **flags} for number, piece in enumerate(pieces) if piece.kind == "special"
    ]
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **LLAMA_PIPELINE}
    return with_bos_template(document | {"model": model}, bos)


def with_bos_template(document: dict[str, Any], bos: str | None) -> dict[str, Any]:
    """A tokenizer.json that, asked for special tokens, puts `bos` in front of a text as Llama's does."""
    if bos is None:
        return document | {"post_processor": None}
    number = next(token["id"] for token in document["added_tokens"] if token["content"] == bos)
    marker = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return document | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [marker, first],
            "pair": [marker, first, marker, second],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        }
    }


def canonical_form(
    kinds: list[tuple[str, str]],
    merges: list[tuple[str, str]],
    normaliser: dict[str, Any],
    encode_runs: Callable[[list[str]], list[list[int]]],
) -> dict[str, Any]:
    """The same value for two files that encode alike, from (text, kind) by id, joins in order, and normaliser.

    Converters order differently the joins of one result, which changes no id, and those of spaces alone, which may:
    the ids of runs of spaces stand for these.
    """
    blocks = itertools.groupby(merges, key=lambda merge: "".join(merge).strip(SPACE) and "".join(merge))
    return {
        "pieces": [list(piece) for piece in kinds],
        "merges": [sorted(list(merge) for merge in block) for _, block in blocks],
        "spaces": encode_runs([" " * length for length in range(1, 65)]),
        "normaliser": normaliser,
    }


def piece_bytes(text: str, kind: str) -> bytes:
    """What a piece adds to a text, as UTF-8; nothing for special pieces."""
    match kind:
        case "special":
            return b""
        case "byte":
            return bytes.fromhex(text[3:5])
        case "byte-level":
            return bytes(_BYTE_LEVEL[character] for character in text)
    return text.replace(SPACE, " ").encode()


def edge_case_texts(pieces: list[str]) -> Iterator[str]:
    """Texts on which converters have gone wrong: pieces in random order, runs of spaces, every plane of Unicode."""
    shuffled = sorted(pieces)
    order = random.Random(0)
    for separator in ("", "", " ", "\n"):
        order.shuffle(shuffled)
        yield separator.join(shuffled)
    for length in range(70):
        run = " " * length
        yield f"{run}foo{run}\n{run}({run}1{run}é{run}"
    yield "".join(chr(code) for code in range(0, 0x110000, 89) if not 0xD800 <= code < 0xE000)
    yield "".join(map(chr, range(0x250)))
    yield from ("", " ", "▁", "▁▁ x", "\0", "a\0b", "<s>x</s> <unk><0x0A>", "\t\t\tx\r\n\r\n", "e\u0301\ufeff\ufffd")
