"""Byte-level BPE: the known pre-tokenizers, and the tokenizer.json with Llama 3's.

A byte-level BPE represents every byte by a character, and merges these characters inside the parts into which a regular
expression splits the text. The encoder and llama.cpp know these pre-tokenizers only by their settings, so each known
one is listed here.
"""

from collections.abc import Sequence
from typing import Any

from tinyllama.tokenizer.conversion import BYTE_LEVEL, with_bos_template

BYTE_LEVEL_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS_STEP = {"type": "Digits", "individual_digits": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _split_steps(digits: str) -> list[dict[str, Any]]:
    """Return a pre-tokenizer whose pattern matches as many digits at once as the quantifier `digits` allows."""
    split = {"type": "Split", "pattern": {"Regex": digits.join(_WORDS)}, "behavior": "Isolated", "invert": False}
    return [split, BYTE_LEVEL_STEP | {"use_regex": False}]


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [BYTE_LEVEL_STEP],
    "smollm": [DIGITS_STEP, BYTE_LEVEL_STEP],
    "llama3": _split_steps("{1,3}"),
    "qwen2": _split_steps(""),
}
"""Steps of the known pre-tokenizers, as `pre_tokenizer_steps` returns them, by the first model that has them."""
LLAMA_CPP_NAMES = {
    "gpt2": ("gpt-2", False),
    "smollm": ("smollm", False),
    "llama3": ("llama-bpe", True),
    "qwen2": ("qwen2", False),
}
"""llama.cpp's name of each known pre-tokenizer, and the setting `ignore_merges` that llama.cpp combines with it."""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""Llama 3's BOS and EOS tokens."""


def pre_tokenizer_steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json's pre-tokenizer, without the option trim_offsets, which changes no ids."""
    step = document.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step] if step else []
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def known_pre_tokenizer(document: dict[str, Any]) -> str | None:
    """Return the name in `PRE_TOKENIZERS` of a tokenizer.json's pre-tokenizer, or None."""
    steps = pre_tokenizer_steps(document)
    return next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)


def byte_level_json(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str] = (BOS, EOS)
) -> dict[str, Any]:
    """Return a tokenizer.json with Llama 3's pre-tokenizer, which puts BOS before a text.

    `tokens` are the tokens in the order of their ids, as characters that represent bytes; the special tokens get the
    ids after them. A word that is a token gets its id, whether or not merges produce the token.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    steps = [step | ({"trim_offsets": True} if "add_prefix_space" in step else {}) for step in PRE_TOKENIZERS["llama3"]]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in enumerate(special, len(tokens))],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [" ".join(merge) for merge in merges],
        },
    }
    return with_bos_template(document, BOS)


_CHARACTERS = {byte: character for character, byte in BYTE_LEVEL.items()}


def to_characters(token: bytes) -> str:
    """Return the characters that represent the bytes of a token."""
    return "".join(map(_CHARACTERS.__getitem__, token))
