"""GGUF files: settings, weights and tokenizers in llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
from tests.release.formats import SHAPE, failed_checks, keep_only, random_model, write_release
from tests.release.native import ids_in_llama_cpp, run_in_child
from tests.vocabularies import (
    BYTES,
    EDGE_CASES,
    add_tokens,
    byte_level_document,
    rank_file,
    trained_ranks,
    write_byte_level,
)
from tokenizers import pre_tokenizers

from tinyllama.errors import InputError
from tinyllama.release.formats import ReleasedFormat
from tinyllama.release.gguf import write_gguf
from tinyllama.release.release import write_hugging_face
from tinyllama.release.verify import compute_reference_outputs, verify_format
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.backends import HuggingFaceBackend
from tinyllama.tokenizer.byte_level import PRE_TOKENIZERS
from tinyllama.tokenizer.conversion import edge_case_texts

DIGITS = pre_tokenizers.Digits(individual_digits=True)
QWEN2 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS["qwen2"][0]["pattern"]["Regex"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_keys_describe_the_model_and_its_tokenizer(all_formats: Path) -> None:
    fields = fields_of(all_formats / "gguf/small-F16.gguf")
    expected = {
        "general.name": "small",
        "llama.context_length": SHAPE.context_length,
        "llama.vocab_size": 600,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 341]


def test_files_have_their_types_and_decreasing_sizes(all_formats: Path) -> None:
    sizes = [(all_formats / f"gguf/small-{kind}.gguf").stat().st_size for kind in ("F16", "Q8_0", "Q4_K_M")]
    assert sizes == sorted(sizes, reverse=True)
    types = types_of(all_formats / "gguf/small-F16.gguf")
    assert {kind for name, kind in types.items() if name.endswith("norm.weight")} == {"F32"}
    assert {kind for name, kind in types.items() if not name.endswith("norm.weight")} == {"F16"}
    assert types_of(all_formats / "gguf/small-Q8_0.gguf")["blk.0.ffn_down.weight"] == "Q8_0"
    assert len(list((all_formats / "gguf").iterdir())) == 3


@pytest.mark.parametrize("change", [{"tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-3}, {"kv_heads": 4}])
def test_every_shape_passes_in_llama_cpp(tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any]) -> None:
    model = random_model(tokenizer.vocab_size + 3, SHAPE.model_copy(update=change))  # three spare rows
    release = write_release(tmp_path / "release", model, tokenizer, ["gguf"])
    assert failed_checks(keep_only(release, "gguf")) == []
    assert ("output.weight" in types_of(release / "gguf/small-F16.gguf")) == ("tie_embeddings" not in change)


@pytest.mark.parametrize("with_model", [True, False])
def test_llama_cpp_encodes_edge_cases_as_we_do(all_formats: Path, tmp_path: Path, with_model: bool) -> None:
    tokenizer, path = Tokenizer.load(all_formats / "huggingface"), all_formats / "gguf/small-F16.gguf"
    if not with_model:  # scores then come from the merges
        tokenizer.save(tmp_path / "tokenizer")
        (tmp_path / "tokenizer/tokenizer.model").unlink()
        tokenizer = Tokenizer.load(tmp_path / "tokenizer")
        path = write_release(tmp_path / "release", random_model(600), tokenizer, ["gguf"]) / "gguf/small-F16.gguf"
    texts = list(edge_case_texts([piece.decode(errors="ignore") for piece in tokenizer.token_bytes()]))
    assert run_in_child(ids_in_llama_cpp, path, texts) == [[1, *tokenizer.encode(text)] for text in texts]


@pytest.mark.parametrize(
    ("words", "name", "with_bos"),
    [
        (pre_tokenizers.Sequence([DIGITS, BYTES]), "smollm", False),
        (BYTES, "gpt-2", True),
        (QWEN2, "qwen2", False),
    ],
)
def test_byte_level_tokenizer_passes_in_llama_cpp(tmp_path: Path, words: Any, name: str, with_bos: bool) -> None:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer", words, with_bos))
    assert tokenizer.bos_prefix == [0] * with_bos
    release = write_release(tmp_path / "release", random_model(tokenizer.vocab_size), tokenizer, ["gguf"])
    assert failed_checks(keep_only(release, "gguf")) == []
    fields = fields_of(release / "gguf/small-F16.gguf")
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.add_bos_token"] is with_bos
    texts = list(edge_case_texts([piece.decode(errors="ignore") for piece in tokenizer.token_bytes()]))
    expected = [tokenizer.bos_prefix + tokenizer.encode(text) for text in texts]
    assert run_in_child(ids_in_llama_cpp, release / "gguf/small-F16.gguf", texts) == expected


def test_imported_rank_file_passes_in_llama_cpp(tmp_path: Path) -> None:
    """The ranks contain tokens that only a complete word gets, because no merges produce them."""
    (tmp_path / "tokenizer.model").write_bytes(rank_file(trained_ranks()))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    release = write_release(tmp_path / "release", random_model(tokenizer.vocab_size), tokenizer, ["gguf"])
    assert failed_checks(keep_only(release, "gguf")) == []
    fields = fields_of(release / "gguf/small-F16.gguf")
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (602, 603)
    vocabulary = [token.decode(errors="ignore") for token in tokenizer.token_bytes()]
    texts = [*edge_case_texts(vocabulary), *EDGE_CASES, " xqzxqz", " xqzxqzx", "žluť"]
    ids = run_in_child(ids_in_llama_cpp, release / "gguf/small-F16.gguf", texts)
    assert ids == [[602, *tokenizer.encode(text)] for text in texts]
    assert ids[-3] == [602, 600]


@pytest.mark.parametrize(("name", "ignore_merges"), [("llama3", False), ("gpt2", True)])
def test_ignore_merges_that_llama_cpp_does_not_support_is_an_error(
    tmp_path: Path, name: str, ignore_merges: bool
) -> None:
    document = byte_level_document(name)
    document["model"] = document["model"] | {"ignore_merges": ignore_merges}
    tokenizer = Tokenizer(HuggingFaceBackend(name, document, {"eos_token": "<|im_end|>"}))
    with pytest.raises(InputError, match=f"{name}: .*gguf.*ignore_merges"):
        tokenizer.check_formats(["gguf"])


@pytest.mark.parametrize("kind", ["llama", "gpt-2"])
def test_special_tokens_beyond_the_rows_are_dropped(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    if kind == "gpt-2":
        tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer"))
    model = random_model(tokenizer.vocab_size)
    write_hugging_face(tmp_path / "huggingface", model, tokenizer)
    assert add_tokens(tmp_path / "huggingface", "<pad>", "<|im_sep|>") == tokenizer.vocab_size
    write_gguf(tmp_path / "gguf", tmp_path / "huggingface", "small")
    expected = compute_reference_outputs(model, tokenizer)
    expected["texts"] += [{"text": text, "ids": tokenizer.bos_prefix + tokenizer.encode(text)} for text in ["a<pad>b"]]
    path = tmp_path / "gguf/small-Q8_0.gguf"
    checks = verify_format(ReleasedFormat("gguf Q8_0", "llama_cpp", path.name), path, expected)
    assert [check.what for check in checks if check.passed] == ["bos, eos", "tokens", "nats per token"]


def test_tokenizer_unknown_to_llama_cpp_is_an_error(tmp_path: Path) -> None:
    words = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer", words))
    write_hugging_face(tmp_path / "huggingface", random_model(tokenizer.vocab_size), tokenizer)
    with pytest.raises(InputError, match=r"tokenizer\.json: .*Punctuation"):
        write_gguf(tmp_path / "gguf", tmp_path / "huggingface", "small")


def test_weight_beyond_float16_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(tokenizer.vocab_size)
    with torch.no_grad():
        model.head_weight[5, 5] = 1e5
    write_hugging_face(tmp_path / "huggingface", model, tokenizer)
    with pytest.raises(InputError, match=r"lm_head\.weight: .*65504"):
        write_gguf(tmp_path / "gguf", tmp_path / "huggingface", "small")
