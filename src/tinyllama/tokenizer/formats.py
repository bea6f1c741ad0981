"""Checks whether a release format can represent a tokenizer, without the library of the format.

The writers of the formats and the check before `prepare` and `train` (`preflight`) both call these functions. The
writers and the check therefore refuse the same tokenizers with the same message.
"""

from collections.abc import Mapping

from tinyllama.errors import InputError
from tinyllama.tokenizer.backends import Backend, HuggingFaceBackend

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZER_NAMES = (([_BYTE_LEVEL], "gpt-2"), ([_DIGITS, _BYTE_LEVEL], "smollm"))
"""Pre-tokenizers of a byte-level tokenizer.json, and llama.cpp's name for each pre-tokenizer."""


def check_format(format_name: str, backend: Backend) -> None:
    """Raise InputError if a release format (huggingface, gguf or ctranslate2) cannot represent the tokenizer."""
    converted = backend.converted  # every format is written from the tokenizer.json
    if format_name == "gguf":
        # Without an EOS token, llama.cpp would end a text at the token with a fixed id, which may be any token.
        _check_special_tokens(converted, format_name, {"eos_token": converted.eos_id})
        if not converted.is_llama_style:
            pre_tokenizer_name(converted)
    if format_name == "ctranslate2":
        # CTranslate2 needs both special tokens. It uses a token's position in the vocabulary file as the token's id.
        _check_special_tokens(converted, format_name, {"bos_token": converted.bos_id, "eos_token": converted.eos_id})
        gap = next((number for number, (text, _) in enumerate(converted.tokens()) if not text), None)
        if gap is not None:
            raise _refusal(converted, format_name, f"no token has id {gap}", "use a tokenizer without unused ids")


def pre_tokenizer_name(backend: HuggingFaceBackend) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    Raises InputError if llama.cpp has no equivalent pre-tokenizer.
    """
    parsed, model = backend.parsed, backend.parsed["model"]
    changes = [key for key in ("dropout", "ignore_merges", "end_of_word_suffix") if model.get(key)]
    if parsed.get("normalizer") not in (None, {}, {"type": "Sequence", "normalizers": []}):
        changes.append("normalizer")
    step = parsed.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step] if step else []
    # trim_offsets changes no id
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    name = next((name for rules, name in PRE_TOKENIZER_NAMES if rules == steps), None)
    if name is None or changes or not backend.is_byte_level or model.get("type") != "BPE":
        found = ", ".join(str(step.get("type")) for step in steps) or "no pre-tokenizer"
        kind = " ".join([f"{model.get('type')} of {found}", *changes])
        raise _refusal(backend, "gguf", kind, "use a tokenizer like Llama 2's, GPT-2's or SmolLM2's")
    return name


def _check_special_tokens(backend: HuggingFaceBackend, format_name: str, ids: Mapping[str, int | None]) -> None:
    for name, number in ids.items():
        if number is None:
            remedy = f"name one of its special tokens as {name} in the tokenizer_config.json next to it"
            raise _refusal(backend, format_name, f"no {name}", remedy)


def _refusal(backend: HuggingFaceBackend, format_name: str, reason: str, remedy: str) -> InputError:
    return InputError(
        f"{backend.name}: this tokenizer cannot be written as {format_name} ({reason}); remove {format_name} from the "
        f"formats, or {remedy}"
    )
