"""Whether a tokenizer can be written in a format of a release: decided by the tokenizer alone, without any library.

The writers of the formats (`release.gguf_tokenizer`, `release.ctranslate2`) and the check before `prepare` and `train`
(`preflight`) use the same functions, so that they refuse the same tokenizers with the same words.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tinyllama.errors import InputError
from tinyllama.tokenizer.backends import HuggingFaceBackend, TokenizerFile

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZER_NAMES = (([_BYTE_LEVEL], "gpt-2"), ([_DIGITS, _BYTE_LEVEL], "smollm"))
"""How a byte-level tokenizer.json cuts text into words, and llama.cpp's name for it."""


def check_format(format_name: str, file: TokenizerFile) -> None:
    """Raise InputError where a format of a release cannot hold the tokenizer."""
    written = file.converted  # what a release holds, and what its other formats are made from
    _CHECKS[format_name](written)


def word_rules(file: HuggingFaceBackend) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer.json cuts text. Raises InputError where it has none."""
    parsed, model = file.parsed, file.parsed["model"]
    changes = [key for key in ("dropout", "ignore_merges", "end_of_word_suffix") if model.get(key)]
    changes += ["normalizer"] if _changes_text(parsed.get("normalizer")) else []
    steps = [_without_offsets(step) for step in _flat(parsed.get("pre_tokenizer") or {})]
    named = next((name for rules, name in PRE_TOKENIZER_NAMES if rules == steps), None)
    if named is None or changes or not file.is_byte_level or model.get("type") != "BPE":
        found = ", ".join(str(step.get("type")) for step in steps) or "no pre-tokenizer"
        kind = " ".join([f"{model.get('type')} of {found}", *changes])
        raise _refusal(file, "gguf", kind, "use a tokenizer of Llama 2's kind, GPT-2's or SmolLM2's")
    return named


def _changes_text(normaliser: Mapping[str, Any] | None) -> bool:
    return bool(normaliser) and normaliser != {"type": "Sequence", "normalizers": []}  # as transformers writes none


def _flat(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(step["pretokenizers"]) if step.get("type") == "Sequence" else [step] if step else []


def _without_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "trim_offsets"}  # which changes no id


def _check_gguf(file: HuggingFaceBackend) -> None:
    """Where there is no EOS token, llama.cpp ends a text at a token that it chooses by its number."""
    _check_special(file, "gguf", {"eos_token": file.eos_id})
    if not file.is_llama_style:
        word_rules(file)


def _check_ctranslate2(file: HuggingFaceBackend) -> None:
    """CTranslate2 loads no model without both special tokens, and numbers the tokens by their order."""
    _check_special(file, "ctranslate2", {"bos_token": file.bos_id, "eos_token": file.eos_id})
    gap = next((number for number, (text, _) in enumerate(file.kinds()) if not text), None)
    if gap is not None:
        raise _refusal(file, "ctranslate2", f"no token has id {gap}", "use a tokenizer without gaps in its ids")


def _check_special(file: HuggingFaceBackend, format_name: str, ids: Mapping[str, int | None]) -> None:
    for name, number in ids.items():
        if number is None:
            remedy = f"name one of its special tokens as {name} in the tokenizer_config.json next to it"
            raise _refusal(file, format_name, f"no {name}", remedy)


def _refusal(file: HuggingFaceBackend, format_name: str, why: str, remedy: str) -> InputError:
    return InputError(
        f"{file.name}: a tokenizer that cannot be written as {format_name} ({why}); leave {format_name} out of the "
        f"formats, or {remedy}"
    )


_CHECKS: dict[str, Callable[[HuggingFaceBackend], None]] = {
    "huggingface": lambda _: None,
    "gguf": _check_gguf,
    "ctranslate2": _check_ctranslate2,
}
