"""Exact conversion of text to token ids and back, several times as fast as SentencePiece.

This package reads a tokenizer from a tokenizer.json, a tokenizer.model (SentencePiece or tiktoken), a folder or the
hub. It writes a folder that transformers can load. gigatoken encodes documents (`tokenizer.encoder`), after its ids
were compared with those of the library of the file format (SentencePiece or `tokenizers`). If they differ, this library
encodes the documents.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, read_regular_file, write_json
from tinyllama.strict_json import json_bytes
from tinyllama.text import TextLike, to_str
from tinyllama.tokenizer.backends import (
    Backend,
    HuggingFaceBackend,
    SentencePieceBackend,
    fit_to_embedding,
    read_tokenizer,
)
from tinyllama.tokenizer.byte_level import LLAMA_CPP_NAMES, known_pre_tokenizer, pre_tokenizer_steps
from tinyllama.tokenizer.conversion import token_bytes
from tinyllama.tokenizer.encoder import Encoder, TokenIds, create_encoder, iter_utf8_chunks_strict

# If a GGUF file names no EOS token, llama.cpp ends a text at a fixed id instead, which may be the id of any token.
_REQUIRED_TOKENS = {"gguf": ("eos",), "ctranslate2": ("bos", "eos")}
"""Special tokens that a release format needs."""
SAVED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
"""Names of the files that `Tokenizer.save` writes."""


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the type of token ids in arrays and in a store: uint16, or uint32 for more than 65,536 tokens."""
    return np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")


class Tokenizer:
    """Tokenizer with exact encoding and decoding."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.bos_id, self.eos_id, self.unk_id = backend.bos_id, backend.eos_id, backend.unk_id
        self.dtype = token_dtype(self.vocab_size)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Load a tokenizer from a tokenizer.json, a tokenizer.model, a folder (tokenizer.json is preferred) or the hub.

        Raises InputError if the source has no tokenizer, if a file is damaged, or if the hub cannot provide a file.
        """
        return cls(read_tokenizer(source))

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self._backend.name}: {self.vocab_size:,} tokens)"

    def fitted(self, num_embeddings: int) -> "Tokenizer":
        """Return the tokenizer for an embedding of `num_embeddings` rows; see `fit_to_embedding`."""
        backend = fit_to_embedding(self._backend, num_embeddings)
        return self if backend is self._backend else Tokenizer(backend)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all settings that determine the ids; equal for the two file formats of one tokenizer."""
        canonical = json.dumps(self._backend.canonical(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def bos_prefix(self) -> list[int]:
        """Ids that a released model expects before a prompt, such as BOS for Llama-style tokenizers; may be empty."""
        return self._backend.bos_prefix

    @cached_property
    def adds_space(self) -> bool:
        """Whether the first token of a text begins with a space that is not in the text, as in Llama 2."""
        tokens = self._backend.tokens
        return b"".join(token_bytes(tokens[number]) for number in self.encode("a")).startswith(b" ")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; `<s>` in the text is encoded as plain text.

        The library of the file format encodes the text, so that a short text needs no other encoder. For long texts
        `encode_array` is faster. Raises InputError for a lone surrogate, which UTF-8 cannot represent.
        """
        return self._backend.encode(b"".join(iter_utf8_chunks_strict(text)).decode())

    def encode_array(self, text: TextLike) -> TokenIds:
        """Return the same ids as `encode` in an array of type `self.dtype`, with little additional memory."""
        return next(self.encode_documents([text], bos=False, eos=False))

    def encode_documents(self, texts: Iterable[TextLike], bos: bool = True, eos: bool = True) -> Iterator[TokenIds]:
        """Yield one array of ids per document (a string or its UTF-8 bytes), with BOS and EOS if requested."""
        before, after = self._special_ids("bos", bos), self._special_ids("eos", eos)
        for text in texts:
            yield np.concatenate((before, *self._parts(text), after))

    def encode_parts(self, text: TextLike, bos: bool = True, eos: bool = True) -> Iterator[TokenIds]:
        """Yield the ids of one document in parts, which take little memory however long the document is."""
        before, after = self._special_ids("bos", bos), self._special_ids("eos", eos)
        yield before
        yield from self._parts(text)
        yield after

    def _parts(self, text: TextLike) -> Iterator[TokenIds]:
        parts = [self.encode(to_str(text))] if self._encoder is None else self._encoder.encode(text)
        return (np.asarray(ids, self.dtype) for ids in parts)

    def start_encoder(self) -> None:
        """Create the encoder of documents, which forked processes then share; otherwise the first document does so."""
        _ = self._encoder

    @cached_property
    def _encoder(self) -> Encoder | None:
        return create_encoder(self._backend)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a list of ids. Special tokens have no text, and bytes that are not UTF-8 become U+FFFD."""
        numbers = [int(number) for number in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                size = f"{self._backend.name} has {self.vocab_size} tokens"
                raise InputError(f"token id {number}: {size}; use the tokenizer that encoded the text")
        text: str = self._backend.decode(numbers)
        return text

    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes that each id adds to a text; special tokens add no bytes."""
        return [token_bytes(token) for token in self._backend.tokens]

    def special_text(self, number: int | None) -> str | None:
        """Return the text of a special token, such as `<s>`, from its id; None for None."""
        return None if number is None else self._backend.tokens[number].text

    @cached_property
    def incomplete_ids(self) -> frozenset[int]:
        """Ids after which the next token can still change the text decoded so far: single bytes and special tokens.

        Consecutive byte tokens are decoded together. If one of the bytes is invalid, each of them becomes U+FFFD.
        """
        tokens = self._backend.tokens
        return frozenset(number for number, token in enumerate(tokens) if token.type in ("byte", "special"))

    def check_formats(self, names: Iterable[str]) -> None:
        """Raise InputError if a release format (huggingface, gguf, ctranslate2) cannot represent this tokenizer.

        The check does not need the formats' own libraries, since every format is written from the tokenizer.json.
        """
        found = self._backend.converted
        for name in names:
            for token in _REQUIRED_TOKENS.get(name, ()):
                if getattr(found, f"{token}_id") is None:
                    remedy = f"set {token}_token to one of its special tokens in the tokenizer_config.json next to it"
                    raise _refusal(found, name, f"no {token}_token", remedy)
            if name == "gguf" and not found.is_llama_style:
                pre_tokenizer_name(found)
            if name == "ctranslate2":  # its ids are the positions of the tokens in the vocabulary file
                gap = next((number for number, (text, _) in enumerate(found.tokens) if not text), None)
                if gap is not None:
                    raise _refusal(found, name, f"no token has id {gap}", "use a tokenizer without unused ids")

    def save(self, directory: str | Path, context: int | None = None) -> None:
        """Write tokenizer.json and its settings to a folder that `transformers.AutoTokenizer` loads with the same ids.

        `context` is the model's context length in tokens. If the tokenizer has a tokenizer.model, that file is also
        written. Raises InputError if a tokenizer.model has no equivalent tokenizer.json.
        """
        folder = Path(directory)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id}
        special = {name: self._backend.token(number) for name, number in names.items() if number is not None}
        settings = {
            # transformers' LlamaTokenizer would rebuild the tokenizer by its own rules
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            # Batches need a padding token. Llama 2 has none, so EOS is used, as in the model's generation_config.json.
            **({"pad_token": special["eos_token"]} if "eos_token" in special else {}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        }
        path, document = folder / "tokenizer.json", json_bytes(self._backend.to_tokenizer_json())
        if path.is_file() and read_regular_file(path) != document:
            path.unlink()  # an old tokenizer.json would make a folder of unfinished files look complete
        write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})
        write_json(folder / "special_tokens_map.json", special)
        if (model := self._backend.sentencepiece_model()) is None:
            (folder / "tokenizer.model").unlink(missing_ok=True)  # an old file may belong to another tokenizer
        else:
            with atomic_write(folder / "tokenizer.model") as file:
                file.write(model)
        with atomic_write(path) as file:  # last, since it marks a complete folder
            file.write(document)

    def _special_ids(self, name: str, is_wanted: bool) -> TokenIds:
        number = self.bos_id if name == "bos" else self.eos_id
        if number is None and is_wanted:
            remedy = f"set data.document.{name} to false"
            if not isinstance(self._backend, SentencePieceBackend):
                remedy += f", or set {name}_token in the tokenizer_config.json next to the tokenizer.json"
            raise InputError(f"{self._backend.name}: no {name}_token; {remedy}")
        return np.array([number] if is_wanted else [], self.dtype)


def pre_tokenizer_name(backend: HuggingFaceBackend) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    Raises InputError if llama.cpp has no equivalent pre-tokenizer.
    """
    document, model = backend.document, backend.document["model"]
    name, ignore_merges = LLAMA_CPP_NAMES.get(known_pre_tokenizer(document) or "", (None, False))
    changes = [key for key in ("dropout", "end_of_word_suffix") if model.get(key)]
    if bool(model.get("ignore_merges")) != ignore_merges:
        changes.append("without ignore_merges" if ignore_merges else "ignore_merges")
    if document.get("normalizer") not in (None, {}, {"type": "Sequence", "normalizers": []}):
        changes.append("normalizer")
    if name is None or changes or not backend.is_byte_level or model.get("type") != "BPE":
        found = ", ".join(str(step.get("type")) for step in pre_tokenizer_steps(document)) or "no pre-tokenizer"
        kind = " ".join([f"{model.get('type')} of {found}", *changes])
        raise _refusal(backend, "gguf", kind, "use a tokenizer like Llama 2's, Llama 3's, GPT-2's or SmolLM2's")
    return name


def _refusal(backend: HuggingFaceBackend, format_name: str, reason: str, remedy: str) -> InputError:
    return InputError(
        f"{backend.name}: this tokenizer cannot be written as {format_name} ({reason}); remove {format_name} from the "
        f"formats, or {remedy}"
    )
