"""The two files that a tokenizer comes in, each read and judged by its own library.

tokenizer.model belongs to SentencePiece and tokenizer.json to `tokenizers`; both answer here to the same names. A
conversion is never taken on trust: 32,000 pieces in random order, runs of up to 69 spaces and a sample of every plane
of Unicode must give SentencePiece's ids and text before a converted file is written.
"""

import itertools
import json
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from sentencepiece import SentencePieceProcessor

from tinyllama.errors import InputError, first_line, warn_once
from tinyllama.files import replacement_remedy
from tinyllama.text import TextLike, iter_utf8_chunks
from tinyllama.tokenizer.conversion import (
    BYTES,
    LLAMA_NORMALISER,
    LLAMA_PIPELINE,
    PIECES,
    SPACE,
    WITHOUT_DUMMY_PREFIX,
    canonical_form,
    convert_pieces,
    edge_case_texts,
    merges_by_score,
    message_fields,
    parse_model,
    with_bos_template,
    write_field,
)
from tinyllama.tokenizer.expansion import check_charsmap, check_expansion

NAMES = ("tokenizer.json", "tokenizer.model")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
MAX_VOCAB_SIZE = 1 << 24  # what an id too large would have each list of all pieces filled up to
UNIGRAM, BPE = 1, 2  # the trainer's model_type in sentencepiece_model.proto
MODEL_TYPES = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")  # a line of Llama 3's tokenizer.model


class SentencePieceBackend:
    """A tokenizer.model: its vocabulary, and encoding as SentencePiece does it."""

    def __init__(self, name: str, model: bytes) -> None:
        try:
            processor = SentencePieceProcessor(model_proto=model)
            self.table, trainer, normaliser = parse_model(model)
            rules, model_type = normaliser.get(2, b"").hex(), trainer.get(3, UNIGRAM)
            self.table[0]  # an empty file is a model without pieces
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, struct.error):
            # what SentencePiece lets through, too: fields of another wire type
            raise InputError(f"{name}: not a whole SentencePiece model; {_how_to_get_model(model)}") from None
        check_charsmap(name, normaliser.get(2, b""))
        self.name, self._model = name, model
        if model_type != BPE:
            raise InputError(
                f"{name}: not a BPE model of SentencePiece but of type {MODEL_TYPES.get(model_type, model_type)}; use "
                "one that was trained with model_type=bpe, or train another folder with `tinyllama tokenizer train`"
            )
        self.normaliser = {
            "dummy_prefix": bool(normaliser.get(3, True)),
            "extra_spaces_removed": bool(normaliser.get(4, True)),
            "space_as_suffix": bool(trainer.get(24, False)),
            "rules": rules,
        }
        self._has_byte_fallback = bool(trainer.get(35, False))
        self.is_llama_style = self.normaliser == LLAMA_NORMALISER and self._has_byte_fallback
        self.pieces = [piece.text for piece in self.table if piece.kind not in ("special", "byte")]
        self.vocab_size = len(self.table)
        self.bos_id, self.eos_id, self.unk_id = (
            None if number < 0 else number for number in (processor.bos_id(), processor.eos_id(), processor.unk_id())
        )
        self.bos_prefix = [] if self.bos_id is None else [self.bos_id]
        self.encode, self.decode = processor.encode, processor.decode
        self._without_prefix = SentencePieceProcessor(model_proto=model + WITHOUT_DUMMY_PREFIX)

    def encode_pretokens(self, runs: list[str]) -> list[list[int]]:
        """Ids of parts of a text: no dummy prefix."""
        return list(map(self._without_prefix.encode, runs))  # a list as argument would start threads: 80 µs a call

    def token(self, number: int | None) -> str | None:
        """The text of a piece."""
        return None if number is None else self.table[number].text

    @cached_property
    def converted(self) -> "HuggingFaceBackend":
        """The equivalent tokenizer.json; InputError where `tokenizers` would not do with it as SentencePiece does."""
        unk, bos, eos = (self.token(number) for number in (self.unk_id, self.bos_id, self.eos_id))
        settings = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
        converted = HuggingFaceBackend(self.name, convert_pieces(self.table, unk, bos), settings)
        for text in edge_case_texts(self.pieces):
            ids = self.encode(text)
            if converted.encode(text) != ids or converted.decode(ids) != self.decode(ids):
                raise InputError(
                    f"{self.name}: no tokenizer.json gives SentencePiece's ids (they differ on {text[:40]!r}); "
                    f"{self._advice()}"
                )
        return converted

    def document(self) -> dict[str, Any]:
        """The contents of the equivalent tokenizer.json; InputError as for `converted`."""
        return self.converted.parsed

    def _advice(self) -> str:
        """What to do where there is no equivalent: name the options of its training that differ from Llama 2's."""
        found = self.normaliser
        options = {
            "normalization_rule_name=identity": found["rules"],
            "byte_fallback=true": not self._has_byte_fallback,
            "remove_extra_whitespaces=false": found["extra_spaces_removed"],
            "add_dummy_prefix=true": not found["dummy_prefix"],
            "treat_whitespace_as_suffix=false": found["space_as_suffix"],
            "no user_defined_symbols": any(piece.kind == "user" for piece in self.table),
        }
        changes = ", ".join(option for option, differs in options.items() if differs)
        train = f"train it again with SentencePiece's {changes}" if changes else "use another tokenizer"
        return f"{train}, or name another folder in `tokenizer` and run `tinyllama tokenizer train`"

    def sentencepiece_model(self) -> bytes:
        """The tokenizer.model."""
        return self._model

    def canonical(self) -> dict[str, Any]:
        """What decides the ids, in the same words as for the equivalent tokenizer.json."""
        return canonical_form(self.kinds(), merges_by_score(self.table), self.normaliser, self.encode_pretokens)

    def kinds(self) -> list[tuple[str, str]]:
        """The text and kind of each id."""
        return [(piece.text, piece.kind) for piece in self.table]

    def without_ids_from(self, num_ids: int) -> Self:
        """The same tokenizer without its last pieces, for `fit_to_rows`."""
        places = itertools.count()
        fields = message_fields(self._model)
        kept = [write_field(number, value) for number, value in fields if number != PIECES or next(places) < num_ids]
        return type(self)(self.name, b"".join(kept))


class HuggingFaceBackend:
    """A tokenizer.json: its vocabulary, and encoding as `tokenizers` does it, special tokens read as plain text."""

    def __init__(
        self, name: str, document: dict[str, Any], settings: dict[str, Any], model: bytes | None = None
    ) -> None:
        self.name, self.parsed = name, document | {"truncation": None, "padding": None}
        self._settings, self._model = settings, model
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.parsed))
        except Exception as error:  # the library raises nothing more precise
            reason = " ".join(str(error).split())
            raise InputError(
                f"{name}: not a valid tokenizer.json for tokenizers {tokenizers.__version__} ({reason}); copy or "
                "download it again or, if a newer version wrote it, pip install --upgrade tokenizers"
            ) from None
        check_expansion(name, document)
        self.tokenizer.encode_special_tokens = True
        self.added = self.parsed.get("added_tokens") or []
        self.ids: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise InputError(
                f"{name}: token id {self.vocab_size - 1}, more than any vocabulary has; correct it or download it again"
            )
        self.special = {token["content"] for token in self.added if token.get("special")}
        self.is_byte_level = "ByteLevel" in json.dumps(self.parsed.get("decoder"))
        self.pieces = list(self.ids.keys() - self.special - BYTES)
        self.is_llama_style = self._is_llama_style()
        self.bos_id = self._special_id(settings.get("bos_token", "<s>"))
        self.eos_id = self._special_id(settings.get("eos_token", "</s>"))
        self.unk_id = self._special_id(settings.get("unk_token", self.parsed["model"].get("unk_token")))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without markers."""
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3 exports no such class
                raise
            raise InputError(f"{self.name}: fails on a text ({first_line(error)}); use another tokenizer") from None
        return ids

    def encode_pretokens(self, runs: list[str]) -> list[list[int]]:
        """Ids of parts of a text: no dummy prefix."""
        tokenize = self.tokenizer.model.tokenize
        return [[token.id for token in tokenize(run.replace(" ", SPACE))] for run in runs]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens have none, as in SentencePiece."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token(self, number: int | None) -> str | None:
        """The text of a piece."""
        text: str | None = None if number is None else self.tokenizer.id_to_token(number)
        return text

    @property
    def converted(self) -> "HuggingFaceBackend":
        """Itself."""
        return self

    def document(self) -> dict[str, Any]:
        """The tokenizer.json to write: the one that was read; of Llama's kind, with the start marker by default."""
        return with_bos_template(self.parsed, self.token(self.bos_id)) if self.is_llama_style else self.parsed

    def sentencepiece_model(self) -> bytes | None:
        """The tokenizer.model that lay beside the file, where it is of the same tokenizer."""
        with suppress(InputError):  # of another kind, such as Llama 3's, or damaged: tokenizer.json decides
            if self._model and SentencePieceBackend(self.name, self._model).canonical() == self.canonical():
                return self._model
        return None

    def canonical(self) -> dict[str, Any]:
        """What decides the ids, in the same words as for the equivalent tokenizer.model."""
        if not self.is_llama_style:
            return {key: self.parsed.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return canonical_form(self.kinds(), self.merges(), LLAMA_NORMALISER, self.encode_pretokens)

    @cached_property
    def bos_prefix(self) -> list[int]:
        """What `document()`, asked for special tokens, puts in front of a text."""
        if self.is_llama_style:
            return [] if self.bos_id is None else [self.bos_id]
        encoded = self.tokenizer.encode("a")
        marked = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return [number for number, _ in itertools.takewhile(lambda pair: pair[1], marked)]

    def merges(self) -> list[tuple[str, str]]:
        """The pairs of pieces that are joined, in their order."""
        merges = self.parsed["model"]["merges"]
        return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]

    def kinds(self) -> list[tuple[str, str]]:
        """The text and kind of each id; an id without a piece is special."""
        texts = {number: text for text, number in self.ids.items()}
        kind = dict.fromkeys(self.ids, "byte-level" if self.is_byte_level else "text")
        kind |= dict.fromkeys(BYTES, "byte") if self.parsed["model"].get("byte_fallback") else {}
        kind |= {token["content"]: "special" if token.get("special") else "text" for token in self.added}
        return [(texts[n], kind[texts[n]]) if n in texts else ("", "special") for n in range(self.vocab_size)]

    def without_ids_from(self, num_ids: int) -> Self:
        """The same tokenizer without the added tokens from `num_ids` on, for `fit_to_rows`."""
        gone = {text for text, number in self.ids.items() if number >= num_ids}
        model, listed = self.parsed["model"], self.parsed["model"]["vocab"]
        if isinstance(listed, dict):  # else in the order of the ids
            vocabulary = {text: number for text, number in listed.items() if number < num_ids}
        else:
            vocabulary = listed[:num_ids]
        added = [token for token in self.added if token["content"] not in gone]
        document = self.parsed | {"added_tokens": added, "model": model | {"vocab": vocabulary}}
        return type(self)(self.name, document, self._settings, self._model)

    def _is_llama_style(self) -> bool:
        model = self.parsed["model"]
        changes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        return (
            all(self.parsed.get(key) == value for key, value in LLAMA_PIPELINE.items())
            and model.get("type") == "BPE"
            and bool(model.get("byte_fallback"))
            and not any(model.get(key) for key in changes)
            and self.ids.keys() >= BYTES
            and self.special.issuperset(token["content"] for token in self.added)
        )

    def _special_id(self, token: str | dict[str, Any] | None) -> int | None:
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else self.ids.get(text)


TokenizerFile = SentencePieceBackend | HuggingFaceBackend


def fit_to_rows(file: TokenizerFile, num_rows: int) -> TokenizerFile:
    """The tokenizer for an embedding of `num_rows` rows, by the rule that all readers and writers share.

    Special tokens beyond the rows, such as a padding token that was added later, come out of no text and no model: they
    are dropped, with a warning. Raises InputError where any other id is beyond them.
    """
    if file.vocab_size <= num_rows:
        return file
    kinds = file.kinds()
    used = {file.bos_id, file.eos_id, file.unk_id, *file.bos_prefix}
    for number in range(num_rows, file.vocab_size):
        text, kind = kinds[number]
        if kind not in ("special", "unused") or number in used:
            raise InputError(
                f"{file.name}: token {text!r} has id {number}, but the weights have {num_rows} rows; "
                "use the tokenizer that belongs to them"
            )
    dropped = [f"{text} ({num_rows + place})" for place, (text, _) in enumerate(kinds[num_rows:]) if text]
    named = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
    warn_once(f"{file.name}: {named}: special tokens beyond the weights' {num_rows} rows; ignored")
    return file.without_ids_from(num_rows)


def read_tokenizer(source: str | Path) -> TokenizerFile:
    """Read a tokenizer.json, a tokenizer.model, a folder with either (the first preferred), or a hub repository's.

    Raises InputError where there is none, where it is damaged, and where the hub cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in NAMES if (path / name).is_file()), path)
    if path.is_dir():
        raise InputError(
            f"{path}: no tokenizer.json and no tokenizer.model in this folder; name a folder that has one, or the file "
            "itself if it has another name"
        )
    if not path.is_file():
        path = _download(str(source))
    if path.suffix == ".model":
        return SentencePieceBackend(str(path), path.read_bytes())
    settings, model = path.with_name("tokenizer_config.json"), path.with_name("tokenizer.model")
    return HuggingFaceBackend(
        str(path),
        _read_object(path),
        _read_object(settings) if settings.is_file() else {},
        model.read_bytes() if model.is_file() else None,
    )


def iter_utf8_chunks_strict(text: TextLike, size: int = 1 << 20, start: int = 0) -> Iterator[bytes]:
    """`iter_utf8_chunks` of what begins at character `start` of a text; InputError names a lone surrogate's place."""
    try:
        for part in iter_utf8_chunks(text, size):
            yield part
            start += size
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: lone surrogate U+{ord(error.object[error.start]):04X} at character {start + error.start}; "
            "take it out, or replace it with U+FFFD"
        ) from None


def _how_to_get_model(model: bytes) -> str:
    """Return the remedy for a tokenizer.model that SentencePiece does not read."""
    if _TIKTOKEN.match(model):
        return "it is a tiktoken vocabulary, as of Llama 3: name the tokenizer.json of the same tokenizer"
    return replacement_remedy(model)


def _read_object(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = "" if path.suffix == ".json" else ", or end the name of a SentencePiece model in .model"
        raise InputError(f"{path}: not valid JSON ({error}); {replacement_remedy(data)}{kind}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON {type(value).__name__} where an object belongs; name a tokenizer.json")
    return value


def _download(name: str) -> Path:
    """A tokenizer file of a hub repository, in the local cache, with its settings beside it."""
    # tokenizers/llama2 beside a folder tokenizers/ is a mistyped path, no repository
    if not HUB_NAME.fullmatch(name) or Path(name).parent.is_dir():
        raise InputError(f"{name}: no such file or folder; name a tokenizer.json, a tokenizer.model or their folder")
    _hub_file(name, "tokenizer_config.json")
    found = next(filter(None, (_hub_file(name, file) for file in NAMES)), None)
    if found is None:
        raise InputError(
            f"{name}: no tokenizer.json and no tokenizer.model in this hub repository, or no repository that you may "
            "read; name another, or set HF_TOKEN to a token that may read it"
        )
    return found


def _hub_file(repository: str, file: str) -> Path | None:
    """A file from the cache or else from the hub; None where the repository has no such file."""
    # 0.3 s that only a hub name is worth
    from httpx import HTTPError  # noqa: PLC0415
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    try:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
        # hf_hub_download alone would try for half a minute where there is no network
        return Path(hf_hub_download(repository, file)) if HfApi().file_exists(repository, file) else None
    except GatedRepoError:
        raise InputError(
            f"{repository}: its owner decides who may read it; ask on its page of the hub, then set HF_TOKEN to a token"
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{repository}: no such file or folder here, and the hub cannot be reached ({type(error).__name__}); "
            "name a tokenizer.json, a tokenizer.model or their folder, or connect to the hub"
        ) from None
