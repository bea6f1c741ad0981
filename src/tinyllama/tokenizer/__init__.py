"""Text to token ids and back, exactly as SentencePiece has it, at five times its speed on one core and more.

Reads tokenizer.json, tokenizer.model, a folder with either, or a hub name; writes a folder that transformers loads.
Words repeat, so encoding is a look-up (tokenizer/memo.py); a vocabulary that does not allow it, such as GPT-2's, goes
through its own library instead.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, json_bytes, write_json
from tinyllama.text import TextLike
from tinyllama.tokenizer.backends import (
    SentencePieceBackend,
    TokenizerFile,
    fit_to_rows,
    iter_utf8_chunks_strict,
    read_tokenizer,
)
from tinyllama.tokenizer.conversion import piece_bytes
from tinyllama.tokenizer.formats import check_format
from tinyllama.tokenizer.memo import DEFAULT_LIMITS, Limits, RunMemo, TokenIds, can_cut_words, neighbours


class Tokenizer:
    """A vocabulary and its exact encoding; `encode_documents` is what the other ways to encode are made of."""

    def __init__(self, file: TokenizerFile, limits: Limits = DEFAULT_LIMITS) -> None:
        self._file = file
        self.vocab_size = file.vocab_size
        self.bos_id, self.eos_id, self.unk_id = file.bos_id, file.eos_id, file.unk_id
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype("uint16" if self.vocab_size <= 1 << 16 else "uint32")
        self._memo = (
            RunMemo(file.pieces, file.encode_pretokens, self.dtype, limits)
            if file.is_llama_style and can_cut_words(neighbours(file.pieces))
            else None
        )

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Load a tokenizer.json, a tokenizer.model, a folder with either (the first preferred), or a hub name.

        Raises InputError where there is none, where it is damaged, and where the hub cannot be reached.
        """
        return cls(read_tokenizer(source))

    def fitted(self, num_rows: int) -> "Tokenizer":
        """The tokenizer for an embedding of `num_rows` rows; see `fit_to_rows`, whose InputError it raises."""
        file = fit_to_rows(self._file, num_rows)
        return self if file is self._file else Tokenizer(file)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides the ids; tokenizer.json and tokenizer.model of one tokenizer have the same."""
        canonical = json.dumps(self._file.canonical(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def bos_prefix(self) -> list[int]:
        """What goes in front of a text that a released model goes on from: <s> for Llama's kind, or nothing."""
        return self._file.bos_prefix

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without markers; a text that spells `<s>` is plain text.

        Raises InputError on a lone surrogate, which no encoding can hold.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: TextLike) -> TokenIds:
        """The ids of `encode` as an array of `dtype`; needs little more memory than the ids, however long the text."""
        return next(self.encode_documents([text], start=False, end=False))

    def encode_documents(self, texts: Iterable[TextLike], start: bool = True, end: bool = True) -> Iterator[TokenIds]:
        """One array of ids for each text (a string, or its UTF-8 bytes), between <s> (`start`) and </s> (`end`)."""
        first = self._special_token_id(self.bos_id, "bos") if start else []
        last = self._special_token_id(self.eos_id, "eos") if end else []
        before, after = np.array(first, self.dtype), np.array(last, self.dtype)
        parts = map(self._encode_with_library, texts) if self._memo is None else self._memo.encode(texts)
        for ids in parts:
            yield np.concatenate((before, *ids, after))

    def _encode_with_library(self, text: TextLike) -> list[TokenIds]:
        """Ids by the tokenizer's own library, which wants a string of what it can encode."""
        whole = b"".join(iter_utf8_chunks_strict(text))
        return [np.array(self._file.encode(whole.decode()), self.dtype)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; markers have none, and bytes that are not UTF-8 become U+FFFD."""
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise InputError(
                    f"token id {number}: {self._file.name} has {self.vocab_size}; use the tokenizer that gave it"
                )
        text: str = self._file.decode(numbers)
        return text

    def piece_bytes(self) -> list[bytes]:
        """What each id adds to a text, as UTF-8 bytes; nothing for markers and other special tokens."""
        return [piece_bytes(text, kind) for text, kind in self._file.kinds()]

    @cached_property
    def incomplete_ids(self) -> frozenset[int]:
        """Ids after which the next may still change the text of those before: single bytes, and what has no text.

        A run of bytes is decoded as a whole: where one of them makes no character, none of them does.
        """
        return frozenset(number for number, (_, kind) in enumerate(self._file.kinds()) if kind in ("byte", "special"))

    def check_formats(self, names: Iterable[str]) -> None:
        """Raise InputError where a release's format (huggingface, gguf, ctranslate2) cannot hold this tokenizer.

        A run's folder has the tokenizer in Hugging Face's format, whatever its releases hold.
        """
        for name in names:
            check_format(name, self._file)

    def save(self, directory: str | Path, context: int | None = None) -> None:
        """Write a folder that `transformers.AutoTokenizer` loads with the same ids: tokenizer.json and its settings.

        `context` is the model's length in tokens. A tokenizer.model that it came from, or with, is written too. Raises
        InputError where a tokenizer.model has no equivalent tokenizer.json.
        """
        folder = Path(directory)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id}
        special = {name: self._file.token(number) for name, number in names.items() if number is not None}
        settings = {
            # transformers' LlamaTokenizer would build the tokenizer anew by its own rules
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            # Llama 2 has no piece for padding; with </s>, as the model's generation_config.json says, batches work
            **({"pad_token": special["eos_token"]} if "eos_token" in special else {}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        }
        last, document = folder / "tokenizer.json", json_bytes(self._file.document())
        if last.is_file() and last.read_bytes() != document:
            last.unlink()  # another tokenizer's, which would be taken for whole beside files of this one
        write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})
        write_json(folder / "special_tokens_map.json", special)
        if (model := self._file.sentencepiece_model()) is None:
            (folder / "tokenizer.model").unlink(missing_ok=True)  # another tokenizer's would mislead
        else:
            with atomic_write(folder / "tokenizer.model") as file:
                file.write(model)
        with atomic_write(last) as file:
            file.write(document)

    def _special_token_id(self, number: int | None, field: str) -> list[int]:
        if number is None:
            token = f"{field}_token"
            name_it = f", or name one as {token} in the tokenizer_config.json next to the tokenizer.json"
            raise InputError(
                f"{self._file.name}: no {token}; set data.document.{field} to false"
                + ("" if isinstance(self._file, SentencePieceBackend) else name_it)
            )
        return [number]
