"""Whether a tokenizer can be written in a format of a release: decided by the tokenizer alone, without any library.

The writers of the formats (`release.gguf_tokenizer`, `release.ctranslate2`) and the check before `prepare` and `train`
(`preflight`) use the same functions, so that they refuse the same tokenizers with the same words.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tinyllama.errors import InputError
from tinyllama.tokenizer_files import TokenizerFile, TokenizersFile

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
WORD_RULES = (([_BYTE_LEVEL], "gpt-2"), ([_DIGITS, _BYTE_LEVEL], "smollm"))
"""How a byte-level tokenizer.json cuts text into words, and llama.cpp's name for it."""


def check_format(format_name: str, file: TokenizerFile) -> None:
    """Raise InputError where a format of a release cannot hold the tokenizer."""
    written = file.converted  # what a release holds, and what its other formats are made from
    _CHECKS[format_name](written)


def word_rules(file: TokenizersFile) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer.json cuts text. Raises InputError where it has none."""
    parsed, model = file.parsed, file.parsed["model"]
    changes = [key for key in ("dropout", "ignore_merges", "end_of_word_suffix") if model.get(key)]
    changes += ["normalizer"] if _changes_text(parsed.get("normalizer")) else []
    steps = [_without_offsets(step) for step in _flat(parsed.get("pre_tokenizer") or {})]
    named = next((name for rules, name in WORD_RULES if rules == steps), None)
    if named is None or changes or not file.is_byte_level or model.get("type") != "BPE":
        found = ", ".join(str(step.get("type")) for step in steps) or "no pre-tokenizer"
        kind = " ".join([f"{model.get('type')} of {found}", *changes])
        raise InputError(
            f"{file.name}: a tokenizer that cannot be written as GGUF ({kind}); leave gguf out of the formats, or use "
            "a tokenizer of Llama 2's kind, GPT-2's or SmolLM2's"
        )
    return named


def _changes_text(normaliser: Mapping[str, Any] | None) -> bool:
    return bool(normaliser) and normaliser != {"type": "Sequence", "normalizers": []}  # as transformers writes none


def _flat(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(step["pretokenizers"]) if step.get("type") == "Sequence" else [step] if step else []


def _without_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "trim_offsets"}  # which changes no id


def _check_gguf(file: TokenizersFile) -> None:
    if not file.is_llama_style:
        word_rules(file)


def _check_ctranslate2(file: TokenizersFile) -> None:
    """CTranslate2 numbers the tokens by their order, and reads the names of both special tokens as text."""
    gap = next((number for number, (text, _) in enumerate(file.kinds()) if not text), None)
    lacking = [name for name, number in (("BOS", file.bos_id), ("EOS", file.eos_id)) if number is None]
    if gap is None and not lacking:
        return
    why = f"no {' and no '.join(lacking)} token" if lacking else f"no token has id {gap}"
    raise InputError(
        f"{file.name}: a tokenizer that cannot be written for CTranslate2 ({why}); leave ctranslate2 out of the formats"
    )


_CHECKS: dict[str, Callable[[TokenizersFile], None]] = {
    "huggingface": lambda _: None,
    "gguf": _check_gguf,
    "ctranslate2": _check_ctranslate2,
}
