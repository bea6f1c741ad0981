"""Tokenizers for tests: a small vocabulary trained here, and Llama 2's if it is available next to the checkout."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tests.conftest import python_sources
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from tinyllama.tokenizer.byte_level import PRE_TOKENIZERS
from tinyllama.tokenizer.encoder import Encoder, supported_document
from tinyllama.tokenizer.training import train_tokenizer, training_text

LLAMA2 = Path(__file__).resolve().parents[2] / "shared/data/llama2/tokenizer.model"
SENTENCEPIECE = ["small", *(["llama2"] if LLAMA2.is_file() else [])]
BYTE_LEVEL = {"gpt2": None, "smollm": None, "llama3": None, "qwen2": {"type": "NFC"}}
"""The byte-level vocabularies and their normalizers; PRE_TOKENIZERS has their pre-tokenizers."""
every_vocabulary = pytest.mark.parametrize("name", SENTENCEPIECE)
every_byte_level = pytest.mark.parametrize("name", BYTE_LEVEL)
every_encoder = pytest.mark.parametrize("name", [*SENTENCEPIECE, *BYTE_LEVEL])
LLAMA_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 800,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# fmt: off
EDGE_CASES = [
    "", " ", "▁", "▁▁", "a▁b", "\0", "a\0", "a\0\0b", "\0" * 15, "\t\tif x:\r\n", "  \n \n\n  ", "<s>", "</s>", "<unk>",
    "<0x0A>", " <s>x</s> ", "Hello world  foo", "x = 1234567890.5e-3", "def f(self):\n        return {'a': [1, 2]}\n",
    "é", "日本語テキスト", "\ufeff\ufffd\u200b", "\U0001f468\u200d\U0001f469", "\U0010ffff\uffff\x7f\x80", "İıßﬁ",
    "e\u0301", " " * 255 + "x", " " * 300, "a" * 40, "-" * 90 + " " + "=" * 15, "naïve.foo(é)ñ_1", "\n" * 50 + "x",
    "x" + " \n" * 40,
]
# fmt: on


def train_sentencepiece(**options: Any) -> bytes:
    """Train a SentencePiece model without our changes of scores."""
    lines = [line for text in python_sources(30) for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **(LLAMA_OPTIONS | options)
    )
    return model.getvalue()


def train_byte_level(words: Any, *special: str) -> tokenizers.Tokenizer:
    """Train a byte-level BPE on real text with this pre-tokenizer; the special tokens get the first ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(python_sources(20), trainer)
    return tokenizer


def write_byte_level(folder: Path, words: Any = BYTES, with_bos: bool = False) -> Path:
    """Write a folder with a byte-level BPE and GPT-2's special tokens in transformers' form."""
    tokenizer = train_byte_level(words, "<|endoftext|>", "<|im_end|>")
    if with_bos:
        single = "<|endoftext|> $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<|endoftext|>", 0)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@cache
def trained_byte_level() -> Tokenizer:
    """Return a byte-level tokenizer with Llama 3's pre-tokenizer: 600 tokens, BOS and EOS."""
    return train_tokenizer(training_text(python_sources(20), kind="bytelevel"), 602)


@cache
def trained_ranks() -> dict[bytes, int]:
    """Return the ranks of a trained vocabulary, with two tokens that no merges produce."""
    tokens = [*trained_byte_level().token_bytes()[:600], b" xqzxqz", "žluť".encode()]
    return {token: rank for rank, token in enumerate(tokens)}


def rank_file(found: Mapping[bytes, int]) -> bytes:
    """Return a tiktoken rank file."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in found.items())


@cache
def model_bytes(name: str) -> bytes:
    return LLAMA2.read_bytes() if name == "llama2" else train_sentencepiece()


@cache
def reference(name: str) -> Any:
    """SentencePiece itself."""
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes(name))


@cache
def sentencepiece_backend(name: str) -> SentencePieceBackend:
    return SentencePieceBackend(name, model_bytes(name))


@cache
def from_model(name: str) -> Tokenizer:
    return Tokenizer(sentencepiece_backend(name))


@cache
def from_json(name: str) -> Tokenizer:
    return Tokenizer(HuggingFaceBackend(name, sentencepiece_backend(name).to_tokenizer_json(), {}))


@cache
def byte_level_document(name: str) -> dict[str, Any]:
    """Return a tokenizer.json with the pre-tokenizer of a known model; `<tool>` is an added token that is not special.

    The vocabulary `smollm` lacks two control characters, as that of SmolLM2 does.
    """
    document: dict[str, Any] = json.loads(train_byte_level(BYTES, "<|endoftext|>", "<|im_end|>").to_str())
    steps = [step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in PRE_TOKENIZERS[name]]
    absent = ("Ą", "Ė") if name == "smollm" else ()
    texts = [text for text, _ in sorted(document["model"]["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {text: number for number, text in enumerate(text for text in texts if text not in absent)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return document | {
        "model": document["model"] | {"vocab": vocabulary, "ignore_merges": name == "llama3"},
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "normalizer": BYTE_LEVEL[name],
        "added_tokens": [*document["added_tokens"], {"id": len(vocabulary), "content": "<tool>", **flags}],
    }


@cache
def backend_of(name: str) -> SentencePieceBackend | HuggingFaceBackend:
    return (
        HuggingFaceBackend(name, byte_level_document(name), {}) if name in BYTE_LEVEL else sentencepiece_backend(name)
    )


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer(backend_of(name))


@cache
def with_small_windows(name: str) -> Tokenizer:
    """Return a tokenizer that encodes all texts of more than 80 bytes in windows."""
    tokenizer, document = Tokenizer(backend_of(name)), supported_document(backend_of(name))
    assert document is not None
    tokenizer._encoder = Encoder(document, backend_of(name), window=80, overlap=60)
    return tokenizer


@cache
def reference_of(name: str) -> Callable[[str], list[int]]:
    """Return the encoding function of SentencePiece itself, or of `tokenizers` itself."""
    if name in BYTE_LEVEL:
        theirs = tokenizers_reference(byte_level_document(name))
        return lambda text: list(theirs.encode(text).ids)
    encode: Callable[[str], list[int]] = reference(name).encode
    return encode


def tokenizers_reference(document: dict[str, Any]) -> Any:
    """`tokenizers` itself, without BOS; special tokens are read as text."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document | {"post_processor": None}))
    tokenizer.encode_special_tokens = True
    return tokenizer


def add_tokens(folder: Path, *texts: str, special: bool = True) -> int:
    """Add tokens after a tokenizer.json's last id, as others do for padding and chats; return the first one's id."""
    document = json.loads((folder / "tokenizer.json").read_text())
    first: int = tokenizers.Tokenizer.from_str(json.dumps(document)).get_vocab_size()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    document["added_tokens"] += [{"id": first + place, "content": text, **flags} for place, text in enumerate(texts)]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return first
