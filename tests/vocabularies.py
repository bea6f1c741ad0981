"""Tokenizers for tests: a small vocabulary trained here, and Llama 2's if it is available next to the checkout."""

import io
import json
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
from tinyllama.tokenizer.memo import Limits

LLAMA2 = Path(__file__).resolve().parents[2] / "shared/data/llama2/tokenizer.model"
every_vocabulary = pytest.mark.parametrize("name", ["small", *(["llama2"] if LLAMA2.is_file() else [])])
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
def with_tiny_memo(name: str) -> Tokenizer:
    """A tokenizer whose memo has two slots, is cleared all the time and splits texts into small blocks."""
    return Tokenizer(sentencepiece_backend(name), Limits(3000, 1, 6, 5))


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
