"""Conversion of a tiktoken rank file, such as Llama 3's tokenizer.model, to the tokenizer.json with the same ids.

Each line of the file is a token in base64 and its rank, which is its id. tiktoken splits a text into words. A word that
is a token gets the id of the token. In another word, tiktoken merges the neighbors that form the token of the lowest
rank, the leftmost ones of several, until no neighbors form a token. The file contains neither the rule that splits a
text nor the special tokens. This module uses those of Llama 3, and refuses files that are known to have other rules.

The tokenizer.json has one merge for each pair of tokens that form a token, in the order of the ranks of these tokens.
The order of the pairs of one token does not matter, because only one of the pairs ever occurs. Before the two tokens of
a pair are merged, no merge crosses the ends of their bytes. The merges inside are then the same in every word, so they
always leave the same two tokens. In Llama 3's file, merges do not produce 588 tokens. These tokens are used for
complete words only.
"""

import base64
import binascii
import random
import re
from collections.abc import Mapping
from functools import cache
from itertools import chain, pairwise
from typing import Any

from tokenizers import Tokenizer

from tinyllama.errors import InputError, warn_once
from tinyllama.tokenizer.byte_level import BOS, EOS, byte_level_json, to_characters
from tinyllama.tokenizer.conversion import BYTE_LEVEL, edge_case_texts

_FIRST_LINE = re.compile(rb"[!-~]+ [0-9]+\r?(\n|$)")
_MAX_TOKEN_BYTES = 256
"""Longest token in bytes; the tokens of Llama 3 have up to 128. A longer one would have very many pairs."""
_LLAMA_3_SIZE = 128_000
_LLAMA_3_SPECIAL = (
    BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    "<|image|>", *(f"<|reserved_special_token_{number}|>" for number in range(2, 246)),
)  # fmt: skip
"""The 256 special tokens of Llama 3 in the order of their ids, as Meta released them with Llama 3.3."""
_OTHER_RULES = {
    50_256: "GPT-2", 50_280: "p50k_base", 100_256: "cl100k_base (GPT-4)", 151_643: "Qwen", 163_584: "Kimi",
    199_998: "o200k_base (GPT-4o)", 200_000: "Llama 4",
}  # fmt: skip
"""Known tokenizers that split a text by another rule, by their number of ranks."""
_CHECKED_TOKENS = 4_000
"""Maximum number of tokens in the texts that check a conversion; the check takes less than a second."""

Ranks = Mapping[bytes, int]


def is_rank_file(data: bytes) -> bool:
    """Return whether a file's first line is that of a tiktoken rank file."""
    return _FIRST_LINE.match(data) is not None


def parse_ranks(name: str, data: bytes) -> dict[bytes, int]:
    """Return the rank of each token, in the order of the ranks, which are 0, 1, 2 and so on.

    Raises InputError if a line is damaged, or if a token or a rank is missing or repeated. Also raises InputError if
    the tokenizer is known to split a text by another rule than Llama 3.
    """
    ranks: dict[bytes, int] = {}
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        encoded, _, rank = line.partition(b" ")
        if not line:
            continue
        try:
            token = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            token = b""
        if not 0 < len(token) <= _MAX_TOKEN_BYTES or not re.fullmatch(rb"\d{1,9}", rank):
            problem = f"line {number} is not a token of 1 to {_MAX_TOKEN_BYTES} bytes in base64 and its rank"
            raise _file_error(name, problem)
        if token in ranks:
            raise _file_error(name, f"line {number} repeats the token {token!r}")
        if int(rank) in tokens:
            raise _file_error(name, f"line {number} repeats the rank {int(rank)}")
        ranks[token] = int(rank)
        tokens[int(rank)] = token
    if (gap := next((rank for rank in range(len(tokens)) if rank not in tokens), None)) is not None:
        raise _file_error(name, f"no token has the rank {gap}, but one has the rank {max(tokens)}")
    if (byte := next((byte for byte in range(256) if bytes([byte]) not in ranks), None)) is not None:
        raise _file_error(name, f"no token for the byte 0x{byte:02X}")
    if len(ranks) in _OTHER_RULES:
        raise InputError(
            f"{name}: the number of ranks, {len(ranks):,}, is that of {_OTHER_RULES[len(ranks)]}, which splits a text "
            "by another rule than Llama 3; use the tokenizer.json of the same tokenizer"
        )
    return {tokens[rank]: rank for rank in range(len(tokens))}


def _file_error(name: str, problem: str) -> InputError:
    return InputError(f"{name}: a damaged tiktoken rank file: {problem}; copy or download it again")


def special_tokens(name: str, ranks: Ranks) -> tuple[str, ...]:
    """Return the special tokens in the order of their ids, which follow the ranks: Llama 3's 256, or BOS and EOS.

    For a file that is not Llama 3's, a warning states what the file does not contain. Raises InputError if a special
    token is also a token.
    """
    is_llama_3 = len(ranks) == _LLAMA_3_SIZE
    special = _LLAMA_3_SPECIAL if is_llama_3 else (BOS, EOS)
    for text in special:
        if (rank := ranks.get(text.encode())) is not None:
            raise InputError(
                f"{name}: the token of rank {rank} is the text of the special token {text}; use the tokenizer.json of "
                "the same tokenizer"
            )
    if not is_llama_3:
        warn_once(
            f"{name}: {len(ranks):,} ranks, but Llama 3's file has {_LLAMA_3_SIZE:,}; a rank file has no rule that "
            f"splits a text and no special tokens, so Llama 3's rule, {BOS} ({len(ranks)}) and {EOS} "
            f"({len(ranks) + 1}) are used"
        )
    return special


def convert_ranks(name: str, ranks: Ranks) -> dict[str, Any]:
    """Return the tokenizer.json with the ids of a rank file; see `special_tokens` for its special tokens."""
    special = special_tokens(name, ranks)
    return byte_level_json([to_characters(token) for token in ranks], merges_by_rank(ranks), special)


def merges_by_rank(ranks: Ranks) -> list[tuple[str, str]]:
    """Return all pairs of tokens that form a token, in the order of the ranks of these tokens and of the parts."""
    pairs = [
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    pairs.sort(key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]], ranks[pair[1]]))
    return [(to_characters(first), to_characters(second)) for first, second in pairs]


def merge_by_rank(ranks: Ranks, word: bytes) -> list[int]:
    """Return the ids of a word by tiktoken's definition; this function is slow, and only checks conversions.

    `ranks` contains all single bytes.
    """
    if word in ranks:
        return [ranks[word]]
    tokens = [bytes([byte]) for byte in word]
    while len(tokens) > 1:
        found = [ranks.get(first + second, len(ranks)) for first, second in pairwise(tokens)]
        if (lowest := min(found)) == len(ranks):
            break
        place = found.index(lowest)
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
    return [ranks[token] for token in tokens]


def check_conversion(name: str, ranks: Ranks, tokenizer: Tokenizer) -> None:
    """Check that a converted tokenizer gives texts the ids of `merge_by_rank`, and decodes them to the same texts.

    The texts are made of tokens in random order and of edge cases. Raises InputError if an id or a text differs.
    """

    @cache
    def ids_of(word: str) -> list[int]:
        return merge_by_rank(ranks, bytes(map(BYTE_LEVEL.__getitem__, word)))

    tokens = [token.decode(errors="ignore") for token in ranks]
    for text in edge_case_texts(random.Random(0).sample(tokens, min(len(tokens), _CHECKED_TOKENS))):
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        ids = list(chain.from_iterable(ids_of(word) for word, _ in words))
        if tokenizer.encode(text, add_special_tokens=False).ids != ids or tokenizer.decode(ids) != text:
            raise InputError(
                f"{name}: the converted tokenizer changes the ids or the text of {text[:40]!r}; please report this, "
                "and use the tokenizer.json of the same tokenizer"
            )
