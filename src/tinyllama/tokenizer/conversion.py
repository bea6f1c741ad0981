"""Conversion of a tokenizer.model to the tokenizer.json with the same ids: pure functions of the files' contents.

SentencePiece merges the pair with the best score, and a tokenizer.json lists its merges by priority. The conversion
therefore sorts the merges by the score of the merged token. In Llama 2's vocabulary, tokens that consist of spaces have
a score of -1e9, so their merges are last. transformers' own conversion orders these merges differently, and its ids are
wrong for repeated spaces. The conversion of Llama 2's 32,000 tokens to 61,249 merges takes 0.1 s.
"""

import base64
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyllama.errors import InputError

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SPACE = "▁"
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))

# Llama 2's normalizer: first in the form of `canonical_form`, then as parts of a tokenizer.json.
LLAMA_NORMALIZER = {"dummy_prefix": True, "extra_spaces_removed": False, "space_as_suffix": False, "rules": ""}
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

# GPT-2 represents bytes as characters: a printable byte as itself, the other bytes from U+0100 on, in order.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

_PIECE_TYPES = {1: "text", 2: "special", 3: "special", 4: "user", 5: "unused", 6: "byte"}
_MAX_EXPANSION = 32
"""Largest factor by which a tokenizer may lengthen a text; Unicode's normalization forms need 18 (UAX 15)."""


class Token(NamedTuple):
    """A vocabulary entry; its type is `text`, `byte-level`, `byte`, `special`, `user` or `unused`."""

    text: str
    type: str


def sentencepiece_tokens(model: "ModelProto") -> list[Token]:
    """Return the vocabulary of a parsed tokenizer.model, sorted by id. Raises ValueError if a token is not UTF-8."""
    tokens = [Token(piece.piece, _PIECE_TYPES[piece.type]) for piece in model.pieces]
    if not all(isinstance(token.text, str) for token in tokens):  # protobuf returns text that is not UTF-8 as bytes
        raise ValueError("a token is not UTF-8")
    return tokens


def merges_by_score(model: "ModelProto") -> list[tuple[str, str]]:
    """Return all pairs of tokens that form another token, in the order in which SentencePiece merges them.

    For equal scores, SentencePiece merges the leftmost pair first. In a run of spaces, one token thus grows to its full
    length before the next token begins. The conversion therefore sorts merges with equal scores by the length of the
    merged token, longest first.
    """
    pieces = [(piece.piece, piece.score) for piece in model.pieces if _PIECE_TYPES[piece.type] == "text"]
    pieces.sort(key=lambda piece: (-piece[1], -len(piece[0])))
    texts = {text for text, _ in pieces}
    return [
        (text[:cut], text[cut:])
        for text, _ in pieces
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in texts and text[cut:] in texts
    ]


def convert_model(model: "ModelProto", unk: str | None, bos: str | None) -> dict[str, Any]:
    """Return the tokenizer.json of a Llama-style tokenizer.model.

    `unk` and `bos` are the texts of the UNK and BOS tokens, or None if the model has no such token.
    """
    tokens = sentencepiece_tokens(model)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token.text, **flags}
            for number, token in enumerate(tokens)
            if token.type == "special"
        ],
        **LLAMA_PIPELINE,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token.text: number for number, token in enumerate(tokens)},
            "merges": [" ".join(merge) for merge in merges_by_score(model)],
        },
    }
    return with_bos_template(document, bos)


def with_bos_template(document: dict[str, Any], bos: str | None) -> dict[str, Any]:
    """Return a copy of a tokenizer.json that puts `bos` before a text if special tokens are requested."""
    if bos is None:
        return document | {"post_processor": None}
    number = next(token["id"] for token in document["added_tokens"] if token["content"] == bos)
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return document | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, special, second],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        }
    }


def canonical_form(
    tokens: list[Token],
    merges: list[tuple[str, str]],
    normalizer: dict[str, Any],
    encode_pretokens: Callable[[list[str]], list[list[int]]],
) -> dict[str, Any]:
    """Return a value that is equal for two files that encode every text equally; `Tokenizer.digest` is its hash.

    Converters differ in the order of merges that produce the same token, but this order does not affect the ids. The
    order of the merges that produce runs of spaces can affect the ids. Instead of these merges, the value therefore
    contains the ids of runs of spaces.
    """
    blocks = itertools.groupby(merges, key=lambda merge: "".join(merge).strip(SPACE) and "".join(merge))
    return {
        "pieces": [list(token) for token in tokens],
        "merges": [sorted(list(merge) for merge in block) for _, block in blocks],
        "spaces": encode_pretokens([" " * length for length in range(1, 65)]),
        "normaliser": normalizer,
    }


def token_bytes(token: Token) -> bytes:
    """Return the UTF-8 bytes that a token adds to a text; a special token adds no bytes."""
    match token.type:
        case "special":
            return b""
        case "byte":
            return bytes.fromhex(token.text[3:5])
        case "byte-level":
            return bytes(BYTE_LEVEL[character] for character in token.text)
    return token.text.replace(SPACE, " ").encode()


def edge_case_texts(tokens: list[str]) -> Iterator[str]:
    """Yield test strings for conversions: tokens in random order, runs of spaces, every plane of Unicode."""
    shuffled = sorted(tokens)
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


def check_expansion(name: str, document: dict[str, Any]) -> None:
    """Raise InputError if a tokenizer.json's normalizer or decoder can lengthen a text by a factor above 32.

    A hostile tokenizer could otherwise replace each letter by a gigabyte.
    """
    for part in ("normalizer", "decoder"):
        if _expansion_factor(document.get(part)) > _MAX_EXPANSION:
            raise InputError(
                f"{name}: its {part} can lengthen a text by a factor above {_MAX_EXPANSION}; use another tokenizer"
            )


def _expansion_factor(step: Any) -> float:
    """Return the largest number of characters that a step of a normalizer or decoder can produce from one character."""
    match step:
        case {"normalizers": list() as steps} | {"decoders": list() as steps}:
            return math.prod(map(_expansion_factor, steps))
        case {"type": "Replace", "content": str() as content, "pattern": {"String": str() as found}}:
            return max(1.0, len(content) / max(1, len(found)))
        case {"type": "Replace", "content": str() as text} | {"type": "Prepend", "prepend": str() as text}:
            return max(1.0, len(text))
        case {"type": "Precompiled", "precompiled_charsmap": str() as charsmap}:
            return _longest_replacement(base64.b64decode(charsmap, validate=True))
    return 1.0


def check_charsmap(name: str, charsmap: bytes) -> None:
    """Raise InputError if SentencePiece's normalization rules can lengthen a text by a factor above 32."""
    if charsmap and _longest_replacement(charsmap) > _MAX_EXPANSION:
        raise InputError(
            f"{name}: its normalization can lengthen a text by a factor above {_MAX_EXPANSION}; use another tokenizer"
        )


def _longest_replacement(charsmap: bytes) -> float:
    """Return the number of characters of the longest replacement in SentencePiece's compiled normalization rules.

    The layout of the rules is a trie's size as a 4-byte integer, the trie, and the replacements, each followed by a NUL
    (sentencepiece/src/normalizer.cc).
    """
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
    return max(1.0, *(len(text.decode(errors="replace")) for text in texts))
