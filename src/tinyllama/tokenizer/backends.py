"""Backends for the two file formats of a tokenizer, each with its own library.

SentencePiece reads tokenizer.model and `tokenizers` reads tokenizer.json; both backends have the same interface. A
tokenizer.model that is a tiktoken rank file becomes a tokenizer.json when it is read (`ranks`). A tokenizer.model of
SentencePiece is converted to a tokenizer.json only if both give the same ids and the same decoded text for all test
strings. The test strings contain all tokens in random order, runs of up to 69 spaces, and a sample of every plane of
Unicode.
"""

import itertools
import json
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from tinyllama.errors import InputError, first_line, warn_once
from tinyllama.files import read_regular_file, replacement_remedy
from tinyllama.tokenizer.byte_level import BOS, EOS
from tinyllama.tokenizer.conversion import (
    BYTES,
    LLAMA_NORMALIZER,
    LLAMA_PIPELINE,
    SPACE,
    Token,
    canonical_form,
    check_charsmap,
    check_expansion,
    convert_model,
    edge_case_texts,
    merges_by_score,
    sentencepiece_tokens,
    with_bos_template,
)
from tinyllama.tokenizer.ranks import check_conversion, convert_ranks, is_rank_file, parse_ranks

NAMES = ("tokenizer.json", "tokenizer.model")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
MAX_VOCAB_SIZE = 1 << 24
"""Maximum vocabulary size. Without this limit, a very large id in a damaged file would allocate huge lists."""
_TRAINING_OPTIONS = (
    "normalization_rule_name=identity, byte_fallback=true, remove_extra_whitespaces=false, add_dummy_prefix=true, "
    "treat_whitespace_as_suffix=false, no user_defined_symbols"
)
"""Options of SentencePiece's trainer for a tokenizer that has an equivalent tokenizer.json."""


class SentencePieceBackend:
    """Tokenizer of a tokenizer.model file; SentencePiece encodes and decodes the text."""

    def __init__(self, name: str, model: bytes) -> None:
        try:
            from google.protobuf.message import DecodeError  # noqa: PLC0415 - a machine that only trains may lack it
            from sentencepiece import SentencePieceProcessor  # noqa: PLC0415
            from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # noqa: PLC0415
        except ModuleNotFoundError as error:
            remedy = "pip install sentencepiece protobuf, or name a folder with a tokenizer.json"
            raise InputError(f"{name}: {error.name} is not installed; {remedy}") from None
        self.name, self._model = name, model
        try:
            processor = SentencePieceProcessor(model_proto=model)
            self._proto = ModelProto.FromString(model)
            self.tokens = sentencepiece_tokens(self._proto)
            without_prefix = ModelProto.FromString(model)
            without_prefix.normalizer_spec.add_dummy_prefix = False
            self._without_prefix = SentencePieceProcessor(model_proto=without_prefix.SerializeToString())
        except (RuntimeError, ValueError, DecodeError):
            self.tokens = []
        if not self.tokens:
            raise InputError(f"{name}: not a complete SentencePiece model; {replacement_remedy(model)}")
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        check_charsmap(name, normalizer.precompiled_charsmap)
        if trainer.model_type != TrainerSpec.BPE:
            raise InputError(
                f"{name}: a SentencePiece model of type {TrainerSpec.ModelType.Name(trainer.model_type).lower()}, not "
                "bpe; use one trained with model_type=bpe, or train a tokenizer with `tinyllama tokenizer train`"
            )
        self.normalizer = {
            "dummy_prefix": normalizer.add_dummy_prefix,
            "extra_spaces_removed": normalizer.remove_extra_whitespaces,
            "space_as_suffix": trainer.treat_whitespace_as_suffix,
            "rules": normalizer.precompiled_charsmap.hex(),
        }
        self.is_llama_style = self.normalizer == LLAMA_NORMALIZER and trainer.byte_fallback
        self.vocab_size = len(self.tokens)
        self.bos_id, self.eos_id, self.unk_id = (
            None if number < 0 else number for number in (processor.bos_id(), processor.eos_id(), processor.unk_id())
        )
        self.bos_prefix = [] if self.bos_id is None else [self.bos_id]
        self.encode, self.decode = processor.encode, processor.decode

    def encode_pretokens(self, pretokens: list[str]) -> list[list[int]]:
        """Return the ids of each part of a text, without adding a dummy prefix."""
        # One call per pretoken: a call with a list starts threads, which takes 80 µs.
        return list(map(self._without_prefix.encode, pretokens))

    def token(self, number: int | None) -> str | None:
        """Return the text of the token with this id, or None if the id is None."""
        return None if number is None else self.tokens[number].text

    def scores(self) -> list[float]:
        """Return the score of each token, in the order of the ids."""
        return [piece.score for piece in self._proto.pieces]

    @cached_property
    def document(self) -> dict[str, Any]:
        """Contents of a tokenizer.json made from the model, whose ids may differ; see `converted`."""
        return convert_model(self._proto, self.token(self.unk_id), self.token(self.bos_id))

    @cached_property
    def converted(self) -> "HuggingFaceBackend":
        """Backend of the equivalent tokenizer.json. Raises InputError if its ids or decoded texts would differ."""
        unk, bos, eos = (self.token(number) for number in (self.unk_id, self.bos_id, self.eos_id))
        settings = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
        converted = HuggingFaceBackend(self.name, self.document, settings)
        for text in edge_case_texts([token.text for token in self.tokens if token.type not in ("special", "byte")]):
            ids = self.encode(text)
            if converted.encode(text) != ids or converted.decode(ids) != self.decode(ids):
                raise InputError(
                    f"{self.name}: no tokenizer.json has the same ids (they differ on {text[:40]!r}); train it again "
                    f"with SentencePiece's options {_TRAINING_OPTIONS}, or name another folder in `tokenizer` and run "
                    "`tinyllama tokenizer train`"
                )
        return converted

    def to_tokenizer_json(self) -> dict[str, Any]:
        """Return the contents of the equivalent tokenizer.json. Raises the same errors as `converted`."""
        return self.converted.document

    def sentencepiece_model(self) -> bytes:
        """Return the tokenizer.model."""
        return self._model

    def canonical(self) -> dict[str, Any]:
        """Return the settings that determine the ids, in the form of `conversion.canonical_form`."""
        return canonical_form(self.tokens, merges_by_score(self._proto), self.normalizer, self.encode_pretokens)

    def truncated(self, num_ids: int) -> Self:
        """Return the same tokenizer with only the ids below `num_ids`."""
        proto = type(self._proto).FromString(self._model)
        del proto.pieces[num_ids:]
        return type(self)(self.name, proto.SerializeToString())


class HuggingFaceBackend:
    """Tokenizer of a tokenizer.json file, with the library `tokenizers`.

    The name of a special token in a text is encoded as plain text.
    """

    def __init__(
        self, name: str, document: dict[str, Any], settings: dict[str, Any], model: bytes | None = None
    ) -> None:
        self.name, self.document = name, document | {"truncation": None, "padding": None}
        self._settings, self._model = settings, model
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.document))
        except Exception as error:  # the library raises no more specific class
            reason = " ".join(str(error).split())
            raise InputError(
                f"{name}: not a valid tokenizer.json for tokenizers {tokenizers.__version__} ({reason}); copy or "
                "download it again or, if a newer version wrote it, pip install --upgrade tokenizers"
            ) from None
        check_expansion(name, document)
        self.tokenizer.encode_special_tokens = True
        self.added = self.document.get("added_tokens") or []
        self.ids: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise InputError(
                f"{name}: token id {self.vocab_size - 1} is too large for a vocabulary; correct it or download it again"
            )
        self.special = {token["content"] for token in self.added if token.get("special")}
        self.is_byte_level = "ByteLevel" in json.dumps(self.document.get("decoder"))
        self.is_llama_style = self._is_llama_style()
        self.bos_id = self._special_id(settings.get("bos_token", "<s>"))
        self.eos_id = self._special_id(settings.get("eos_token", "</s>"))
        self.unk_id = self._special_id(settings.get("unk_token", self.document["model"].get("unk_token")))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""
        ids: list[int] = self._encode(text, add_special_tokens=False).ids
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        """Encode a text. Raises InputError if the library panics."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3 does not export PanicException
                raise
            raise InputError(f"{self.name}: fails on a text ({first_line(error)}); use another tokenizer") from None

    def encode_pretokens(self, pretokens: list[str]) -> list[list[int]]:
        """Return the ids of each part of a text, without adding a dummy prefix."""
        tokenize = self.tokenizer.model.tokenize
        return [[token.id for token in tokenize(pretoken.replace(" ", SPACE))] for pretoken in pretokens]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens have no text, as in SentencePiece."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    @cached_property
    def tokens(self) -> list[Token]:
        """The vocabulary, in the order of the ids; an unused id has an empty text and the type `special`."""
        texts = {number: text for text, number in self.ids.items()}
        types = dict.fromkeys(self.ids, "byte-level" if self.is_byte_level else "text")
        types |= dict.fromkeys(BYTES, "byte") if self.document["model"].get("byte_fallback") else {}
        types |= {token["content"]: "special" if token.get("special") else "text" for token in self.added}
        return [
            Token(texts[number], types[texts[number]]) if number in texts else Token("", "special")
            for number in range(self.vocab_size)
        ]

    def token(self, number: int | None) -> str | None:
        """Return the text of the token with this id, or None if the id is None."""
        text: str | None = None if number is None else self.tokenizer.id_to_token(number)
        return text

    @property
    def converted(self) -> "HuggingFaceBackend":
        """This backend itself, since no conversion is necessary."""
        return self

    def to_tokenizer_json(self) -> dict[str, Any]:
        """Return the tokenizer.json, with a BOS template added for a Llama-style tokenizer."""
        return with_bos_template(self.document, self.token(self.bos_id)) if self.is_llama_style else self.document

    def sentencepiece_model(self) -> bytes | None:
        """Return the tokenizer.model next to the tokenizer.json if both are equivalent, or None.

        Without SentencePiece or protobuf, return the tokenizer.model unchecked: every reader that has both checks it.
        """
        try:
            import sentencepiece.sentencepiece_model_pb2  # noqa: F401, PLC0415
        except ModuleNotFoundError:
            return self._model
        with suppress(InputError):  # ignore a tokenizer.model that is damaged or, like Llama 3's, of another kind
            if self._model and SentencePieceBackend(self.name, self._model).canonical() == self.canonical():
                return self._model
        return None

    def canonical(self) -> dict[str, Any]:
        """Return the settings that determine the ids, in the form of `conversion.canonical_form`."""
        if not self.is_llama_style:
            return {key: self.document.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return canonical_form(self.tokens, self.merges(), LLAMA_NORMALIZER, self.encode_pretokens)

    @cached_property
    def bos_prefix(self) -> list[int]:
        """Ids that the written tokenizer.json puts before a text when special tokens are requested."""
        if self.is_llama_style:
            return [] if self.bos_id is None else [self.bos_id]
        encoded = self._encode("a", add_special_tokens=True)
        marked = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return [number for number, _ in itertools.takewhile(lambda pair: pair[1], marked)]

    def merges(self) -> list[tuple[str, str]]:
        """Return the pairs of tokens that BPE merges, highest priority first."""
        merges = self.document["model"]["merges"]
        return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]

    def scores(self) -> list[float]:
        """Return one score per id, such that SentencePiece merges tokens in the same order as this tokenizer.

        The scores are those of the tokenizer.model, if there is one. Otherwise, a token's score is the negative rank of
        the merge that produces the token, or 0 without such a merge.
        """
        if model := self.sentencepiece_model():
            return SentencePieceBackend(self.name, model).scores()
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self.merges(), start=1):
            ranks.setdefault("".join(merge), rank)
        return [-float(ranks.get(text, 0)) for text, _ in self.tokens]

    def truncated(self, num_ids: int) -> Self:
        """Return the same tokenizer with only the ids below `num_ids`."""
        model = self.document["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = {text: number for text, number in vocabulary.items() if number < num_ids}
        else:  # listed in the order of the ids
            vocabulary = vocabulary[:num_ids]
        added = [token for token in self.added if self.ids.get(token["content"], 0) < num_ids]
        document = self.document | {"added_tokens": added, "model": model | {"vocab": vocabulary}}
        return type(self)(self.name, document, self._settings, self._model)

    def _is_llama_style(self) -> bool:
        model = self.document["model"]
        changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        return (
            all(self.document.get(key) == value for key, value in LLAMA_PIPELINE.items())
            and model.get("type") == "BPE"
            and bool(model.get("byte_fallback"))
            and not any(model.get(key) for key in changes)
            and self.ids.keys() >= BYTES
            and self.special.issuperset(token["content"] for token in self.added)
        )

    def _special_id(self, token: str | dict[str, Any] | None) -> int | None:
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else self.ids.get(text)


Backend = SentencePieceBackend | HuggingFaceBackend


def fit_to_embedding(backend: Backend, num_embeddings: int) -> Backend:
    """Return the tokenizer without the special tokens whose id is `num_embeddings` or higher.

    An embedding of `num_embeddings` rows has no row for such a token, for example a padding token that was added later.
    These tokens are dropped with a warning, because neither plain text nor the model produces them. Raises InputError
    if a token of plain text, BOS, EOS or the unknown token has such an id.
    """
    if backend.vocab_size <= num_embeddings:
        return backend
    tokens = backend.tokens
    used = {backend.bos_id, backend.eos_id, backend.unk_id, *backend.bos_prefix}
    dropped = []
    for number, (text, kind) in enumerate(tokens[num_embeddings:], num_embeddings):
        if kind not in ("special", "unused") or number in used:
            raise InputError(
                f"{backend.name}: token {text!r} has id {number}, but the embedding has {num_embeddings} rows; "
                "use the tokenizer that belongs to these weights"
            )
        if text:
            dropped.append(f"{text} ({number})")
    named = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
    warn_once(f"{backend.name}: special tokens without a row in the embedding are ignored: {named}")
    return backend.truncated(num_embeddings)


def read_tokenizer(source: str | Path) -> Backend:
    """Read a tokenizer from a tokenizer.json, a tokenizer.model, a folder (tokenizer.json is preferred) or the hub.

    Raises InputError if the source contains no tokenizer, if a file is damaged, or if the hub cannot provide a file.
    """
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        # if a folder tokenizers/ exists, tokenizers/llama2 must be a mistyped path, not a hub repository
        if not HUB_NAME.fullmatch(str(source)) or path.parent.is_dir():
            raise InputError(f"{source}: no such file or folder; name a tokenizer.json, a tokenizer.model or a folder")
        from tinyllama.hub import download_snapshot  # noqa: PLC0415 - the import takes 0.3 s

        path = download_snapshot(str(source), [*NAMES, "tokenizer_config.json"])
    if path.is_dir():
        path = next((path / name for name in NAMES if (path / name).is_file()), path)
        if path.is_dir():
            raise InputError(
                f"{source}: no tokenizer.json and no tokenizer.model; name a folder that has one, or the file itself"
            )
    if path.suffix in (".model", ".tiktoken"):
        data = read_regular_file(path)
        return _from_ranks(str(path), data) if is_rank_file(data) else SentencePieceBackend(str(path), data)
    settings, model = path.with_name("tokenizer_config.json"), path.with_name("tokenizer.model")
    return HuggingFaceBackend(
        str(path),
        _read_object(path),
        _read_object(settings) if settings.is_file() else {},
        read_regular_file(model) if model.is_file() else None,
    )


def _from_ranks(name: str, data: bytes) -> HuggingFaceBackend:
    """Return the backend of a tiktoken rank file, whose ids are compared with those of tiktoken's definition."""
    ranks = parse_ranks(name, data)
    backend = HuggingFaceBackend(name, convert_ranks(name, ranks), {"bos_token": BOS, "eos_token": EOS})
    check_conversion(name, ranks, backend.tokenizer)
    return backend


def _read_object(path: Path) -> dict[str, Any]:
    data = read_regular_file(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = "" if path.suffix == ".json" else ", or give a SentencePiece model a name that ends in .model"
        raise InputError(f"{path}: not valid JSON ({error}); {replacement_remedy(data)}{kind}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__}, not an object; name a tokenizer.json")
    return value
