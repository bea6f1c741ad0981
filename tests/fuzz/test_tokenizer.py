"""Any text has the ids of the reference libraries and decodes to itself; a damaged tokenizer is a one-line error."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.fuzz.strategies import assert_one_line, edited, edited_documents, edits_of_bytes, fixed_examples
from tests.vocabularies import (
    EDGE_CASES,
    from_model,
    model_bytes,
    reference,
    sentencepiece_backend,
    tokenizers_reference,
    train_byte_level,
)

from tinyllama.errors import InputError
from tinyllama.model.generation import stream_decode
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend
from tinyllama.tokenizer.training import train_tokenizer, training_text

KINDS = ["sentencepiece", "converted", "trained here", "byte level"]
# fmt: off
SPECIAL = [
    "<s>", "</s>", "<unk>", "<0x0A>", "▁", "  ", "\u200d", "\ufe0f", "\U0001f469\u200d\U0001f4bb", "\x1b[31m", "\0",
]
# fmt: on
texts = st.lists(st.sampled_from([*EDGE_CASES, *SPECIAL]) | st.text(max_size=8), max_size=8).map("".join)


@cache
def document_of(kind: str) -> dict[str, Any]:
    """Return a tokenizer.json."""
    if kind == "byte level":
        words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        parsed: dict[str, Any] = json.loads(train_byte_level(words, "<s>", "</s>").to_str())
        return parsed
    trained = train_tokenizer(training_text(python_sources(10)), 400)._backend if kind == "trained here" else None
    return (trained or sentencepiece_backend("small")).to_tokenizer_json()


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return (
        from_model("small") if kind == "sentencepiece" else Tokenizer(HuggingFaceBackend(kind, document_of(kind), {}))
    )


@cache
def encoder_of(kind: str) -> Callable[[str], list[int]]:
    """Return the reference library's encoding."""
    if kind == "sentencepiece":
        encode: Callable[[str], list[int]] = reference("small").encode
        return encode
    theirs = tokenizers_reference(document_of(kind))
    return lambda text: list(theirs.encode(text).ids)


@fixed_examples(150)
@given(kind=st.sampled_from(KINDS), text=texts)
def test_any_text_has_its_library_ids_and_decodes_to_itself(kind: str, text: str) -> None:
    ids = tokenizer_of(kind).encode(text)
    assert tokenizer_of(kind).encode_array(text).tolist() == ids == encoder_of(kind)(text)
    assert tokenizer_of(kind).decode(ids) == (text if kind == "byte level" else text.replace("▁", " "))


@fixed_examples(100)
@given(kind=st.sampled_from(KINDS), prompt=texts, chosen=st.lists(st.integers(0, 399), max_size=12))
@example(kind="converted", prompt="a", chosen=[3 + 0xE4])  # an incomplete character at the end was lost
@example(
    kind="converted", prompt="a", chosen=[3 + 0xC3, 3 + 0xA9, 3 + 0xFF, 300]
)  # é, then a byte that is no continuation
@example(kind="converted", prompt="a", chosen=[3 + 0xC3, 2, 3 + 0xA9])  # with </s> between the two bytes
def test_streamed_text_equals_text_of_all_ids(kind: str, prompt: str, chosen: list[int]) -> None:
    """Found 2026-11-24: `generate` lost or changed characters whose bytes were separate tokens."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(prompt)
    parts = list(stream_decode(tokenizer, ids, chosen))
    if ids and ids[-1] not in tokenizer.incomplete_ids and not tokenizer.decode(ids).endswith("\ufffd"):
        assert tokenizer.decode(ids) + "".join(parts) == tokenizer.decode(ids + chosen)
    earlier = [list(stream_decode(tokenizer, ids, chosen[:end])) for end in range(len(chosen))]
    for shorter, longer in pairwise([*earlier, parts]):
        assert longer[: len(shorter) - 1] == shorter[:-1]  # text that was yielded never changes


@fixed_examples(150)
@given(edits=edits_of_bytes, where=st.floats(0, 1))
def test_edited_tokenizer_model_is_used_or_refused(edits: Any, where: float) -> None:
    model = model_bytes("small")
    check_file("tokenizer.model", edited(model, [(int(where * len(model)) + place, *rest) for place, *rest in edits]))


@pytest.mark.parametrize("fields", [b"\x08\x01", b"\x1a\x02\x10\x01"], ids=["tokens", "normalizer"])
def test_tokenizer_model_with_wrong_wire_types_is_used_or_refused(fields: bytes) -> None:
    """Found 2026-11-24: SentencePiece accepts a field of another wire type."""
    check_file("tokenizer.model", model_bytes("small") + fields)


@cache
def tiny_document() -> dict[str, Any]:
    """Return a tokenizer.json with few tokens, so that edits reach the other fields often."""
    texts = training_text(["the cat sat on the mat, and the dog too"] * 50)
    return train_tokenizer(texts, 285)._backend.to_tokenizer_json()


@fixed_examples(150)
@given(document=st.deferred(lambda: edited_documents(tiny_document())))
def test_edited_tokenizer_json_is_used_or_refused(document: Any) -> None:
    check_file("tokenizer.json", json.dumps(document).encode())


def test_unknown_token_in_the_template_is_refused() -> None:
    """Found 2026-11-29: `tokenizers` panicked on a text."""
    valid = tiny_document()
    template = valid["post_processor"] | {"special_tokens": {}}
    check_file("tokenizer.json", json.dumps(valid | {"decoder": None, "post_processor": template}).encode())


def test_huge_token_id_is_refused() -> None:
    """Found 2026-11-24 by atheris: lists of a billion tokens."""
    valid = tiny_document()
    model = valid["model"] | {"vocab": valid["model"]["vocab"] | {"<x>": 10**9}}
    with pytest.raises(InputError, match=r"token id 1000000000 is too large"):
        HuggingFaceBackend("x", valid | {"model": model}, {})


def check_file(name: str, data: bytes) -> None:
    """Check that a tokenizer file is refused in one line, or encodes and decodes texts without an error."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        (Path(folder) / name).write_bytes(data)
        try:
            tokenizer = Tokenizer.load(folder)
            for text in ("", "a  b\n", "é\0", "<s>▁"):
                assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
                assert tokenizer.decode(tokenizer.encode(text)) is not None
            _ = tokenizer.digest, tokenizer.bos_prefix, tokenizer.token_bytes()
            tokenizer.save(Path(folder) / "again")
        except InputError as error:
            assert_one_line(error)
