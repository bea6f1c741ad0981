"""A tokenizer in GGUF's words, so that llama.cpp gives the ids that ours gives.

Llama's kind becomes llama.cpp's "llama" (SentencePiece): it joins the best-scored pair. Byte-level ones become "gpt2",
whose rules for cutting text into words llama.cpp has by name only; a kind that is not in the table here is refused.
"""

from collections.abc import Mapping
from typing import Any

import gguf
from gguf import TokenType

from tinyllama.errors import InputError
from tinyllama.tokenizer_conversion import parse_model
from tinyllama.tokenizer_files import SentencePieceFile, TokenizerFile, TokenizersFile

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
WORD_RULES = (([_BYTE_LEVEL], "gpt-2"), ([_DIGITS, _BYTE_LEVEL], "smollm"))
"""How a byte-level tokenizer.json cuts text into words, and llama.cpp's name for it."""
_TYPES = {
    "text": TokenType.NORMAL,
    "byte": TokenType.BYTE,
    "special": TokenType.CONTROL,
    "user": TokenType.USER_DEFINED,
    "unused": TokenType.UNUSED,
}


def add_tokenizer(writer: gguf.GGUFWriter, file: TokenizerFile, num_rows: int) -> None:
    """Add the tokenizer's keys for a model whose embedding has `num_rows` rows, spare ones included.

    Raises InputError where llama.cpp has no tokenizer of the kind.
    """
    if file.is_llama_style:
        _add_llama(writer, file, num_rows)
    else:
        _add_byte_level(writer, file, num_rows)
    for number, add in (
        (file.bos_id, writer.add_bos_token_id),
        (file.eos_id, writer.add_eos_token_id),
        (file.unk_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(bool(file.start_ids))
    writer.add_add_eos_token(False)


def _add_llama(writer: gguf.GGUFWriter, file: TokenizerFile, num_rows: int) -> None:
    types = [_TYPES[kind] for _, kind in file.kinds()]
    if file.unk_id is not None:
        types[file.unk_id] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _add_pieces(writer, [text for text, _ in file.kinds()], types, num_rows)
    spare = [0.0] * (num_rows - file.vocab_size)
    writer.add_token_scores(piece_scores(file) + spare)
    writer.add_add_space_prefix(True)  # of all that `is_llama_style` means
    writer.add_remove_extra_whitespaces(False)


def _add_byte_level(writer: gguf.GGUFWriter, file: TokenizerFile, num_rows: int) -> None:
    rules = _word_rules(file)
    assert isinstance(file, TokenizersFile)
    kinds = {**_TYPES, "byte-level": TokenType.NORMAL, "text": TokenType.USER_DEFINED}  # text: added, but not special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    _add_pieces(writer, [text for text, _ in file.kinds()], [kinds[kind] for _, kind in file.kinds()], num_rows)
    writer.add_token_merges([" ".join(merge) for merge in file.merges()])


def _add_pieces(writer: gguf.GGUFWriter, texts: list[str], types: list[TokenType], num_rows: int) -> None:
    """Texts and types of all ids; those without a piece, in a gap or after the last, get a name that no text spells."""
    spare = num_rows - len(texts)
    texts = [text or f"[PAD{number}]" for number, text in enumerate([*texts, *[""] * spare])]
    writer.add_token_list(texts)
    writer.add_token_types([*types, *[TokenType.UNUSED] * spare])


def piece_scores(file: TokenizerFile) -> list[float]:
    """The score of each piece: the tokenizer.model's, or else what has pairs joined in the order of the merges."""
    model = file.sentencepiece_model()
    if model is not None:
        return [piece.score for piece in parse_model(model)[0]]
    assert isinstance(file, TokenizersFile)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(file.merges(), start=1):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(text, 0)) for text, _ in file.kinds()]


def _word_rules(file: TokenizerFile) -> str:
    """llama.cpp's name for how a byte-level tokenizer.json cuts text. Raises InputError where it has none."""
    if isinstance(file, SentencePieceFile):
        raise InputError(f"{file.name}: not of Llama's kind ({file.normaliser}), nor byte-level; release without gguf")
    parsed, model = file.parsed, file.parsed["model"]
    changes = [key for key in ("dropout", "ignore_merges", "end_of_word_suffix") if model.get(key)]
    changes += ["normalizer"] if _changes_text(parsed.get("normalizer")) else []
    steps = [_without_offsets(step) for step in _flat(parsed.get("pre_tokenizer") or {})]
    named = next((name for rules, name in WORD_RULES if rules == steps), None)
    if named is None or changes or not file.is_byte_level or model.get("type") != "BPE":
        found = ", ".join(str(step.get("type")) for step in steps)
        kind = " ".join([f"{model.get('type')} of {found}", *changes])
        raise InputError(
            f"{file.name}: a tokenizer that cannot be written as GGUF ({kind}); leave gguf out of release.formats, or "
            "use one of Llama 2's kind, GPT-2's or SmolLM2's"
        )
    return named


def _changes_text(normaliser: Mapping[str, Any] | None) -> bool:
    return bool(normaliser) and normaliser != {"type": "Sequence", "normalizers": []}  # as transformers writes none


def _flat(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(step["pretokenizers"]) if step.get("type") == "Sequence" else [step]


def _without_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "trim_offsets"}  # which changes no id
