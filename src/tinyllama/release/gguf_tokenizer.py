"""A tokenizer in GGUF's words, so that llama.cpp gives the ids that ours gives.

Llama's kind becomes llama.cpp's "llama" (SentencePiece): it joins the best-scored pair. Byte-level ones become "gpt2",
whose rules for cutting text into words llama.cpp has by name only; a kind without one is refused (`tokenizer_formats`).
"""

import gguf
from gguf import TokenType

from tinyllama.tokenizer.backends import HuggingFaceBackend, TokenizerFile, fit_to_rows
from tinyllama.tokenizer.conversion import parse_model
from tinyllama.tokenizer.formats import word_rules

_TYPES = {
    "text": TokenType.NORMAL,
    "byte": TokenType.BYTE,
    "special": TokenType.CONTROL,
    "user": TokenType.USER_DEFINED,
    "unused": TokenType.UNUSED,
}


def add_tokenizer(writer: gguf.GGUFWriter, file: TokenizerFile, num_rows: int) -> None:
    """Add the tokenizer's keys for a model whose embedding has `num_rows` rows, spare ones included.

    Raises InputError where llama.cpp has no tokenizer of the kind, and where the tokenizer does not fit the rows.
    """
    file = fit_to_rows(file, num_rows)  # llama.cpp loads no model with more tokens than rows
    if file.is_llama_style:
        _add_llama(writer, file, num_rows)
    else:
        _add_byte_level(writer, file.converted, num_rows)
    for number, add in (
        (file.bos_id, writer.add_bos_token_id),
        (file.eos_id, writer.add_eos_token_id),
        (file.unk_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(bool(file.bos_prefix))
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


def _add_byte_level(writer: gguf.GGUFWriter, file: HuggingFaceBackend, num_rows: int) -> None:
    rules = word_rules(file)
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
    assert isinstance(file, HuggingFaceBackend)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(file.merges(), start=1):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(text, 0)) for text, _ in file.kinds()]
