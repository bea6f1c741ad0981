"""Scaled rotary frequencies and heads of another width, in every engine, below and beyond the original context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.release.formats import SHAPE, failed_checks, keep_only, random_model, write_release
from tests.release.native import logits_in_ctranslate2, run_in_child
from tests.release.test_gguf import fields_of, types_of
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.model.flops import num_parameters
from tinyllama.model.weights import config_to_hugging_face
from tinyllama.recipe import Model
from tinyllama.release import verify
from tinyllama.release.formats import write_ctranslate2
from tinyllama.release.gguf import rope_factors, write_gguf
from tinyllama.release.verify import (
    NEW_TOKENS,
    TOKENS_BEYOND_ORIGINAL_CONTEXT,
    compute_reference_outputs,
    verify_release,
)
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

CONTEXT, ORIGINAL = 704, 512
"""Context lengths with and without the scaling; that of `linear` is the context length divided by the factor."""
FACTOR = CONTEXT / ORIGINAL
LLAMA3 = {
    "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_context_length": ORIGINAL,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"type": "linear", "factor": FACTOR}},
    "llama3-head-dim-tied": {"rope_scaling": LLAMA3, "head_dim": 24, "tie_embeddings": True},
    "head-dim-without-groups": {"head_dim": 8, "kv_heads": 4},
}


def shape_of(name: str) -> Model:
    return Model.model_validate(SHAPE.model_dump() | {"context_length": CONTEXT} | SHAPES[name])


@pytest.fixture(scope="module", params=SHAPES)
def scaled(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in all formats, read-only; the name of its folder is the name of its shape."""
    folder = tmp_path_factory.mktemp("scaled") / request.param
    return write_release(folder, random_model(tokenizer.vocab_size, shape_of(request.param)), tokenizer)


def test_every_engine_agrees_below_and_beyond_the_original_context(scaled: Path) -> None:
    checks = verify_release(scaled)
    assert [check for check in checks if not check.passed] == []
    reference = read_json(scaled / "release.json")["reference"]
    *short, last = reference["continuations"]
    assert all(len(entry["ids"]) == NEW_TOKENS for entry in [*short, last])
    if "rope_scaling" in SHAPES[scaled.name]:
        assert len(reference["scored"]["ids"]) == ORIGINAL + TOKENS_BEYOND_ORIGINAL_CONTEXT
        assert last["prompt_ids"] == reference["scored"]["ids"][:-NEW_TOKENS]
        assert max(len(entry["prompt_ids"]) for entry in short) < ORIGINAL < len(last["prompt_ids"])
        losses = [check.expected for check in checks if check.what == "nats per token"]
        assert len(losses) == 6 and all(text.endswith("640 tokens (original context 512)") for text in losses)


@torch.no_grad()
def test_ctranslate2_logits_equal_ours_at_every_position(scaled: Path) -> None:
    ids = [3 + 7 * position % 590 for position in range(CONTEXT)]
    found = run_in_child(logits_in_ctranslate2, scaled / "ctranslate2/float32", ids)
    expected = load_model(scaled / "huggingface")(torch.tensor([ids])).numpy()
    # For linear scaling CTranslate2 divides the positions, not the frequencies, which rounds the angles differently.
    assert np.abs(found - expected).max() < 1e-3
    assert expected.std() > 0.1


def test_gguf_describes_heads_and_scaling_as_llama_cpp_reads_them(scaled: Path) -> None:
    shape, path = shape_of(scaled.name), scaled / "gguf/small-F16.gguf"
    fields = fields_of(path)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert fields[f"llama.{name}"] == shape.head_dim
    is_linear = scaled.name == "linear"
    assert fields.get("llama.rope.scaling.type") == ("linear" if is_linear else None)
    assert fields.get("llama.rope.scaling.factor") == (FACTOR if is_linear else None)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert ("rope_freqs.weight" in tensors) == ("llama3" in scaled.name)
    assert ("output.weight" in tensors) != shape.tie_embeddings
    if "rope_freqs.weight" in tensors:
        assert tensors["rope_freqs.weight"].tolist() == next(iter(rope_factors(shape).values())).tolist()
        assert types_of(scaled / "gguf/small-Q4_K_M.gguf")["rope_freqs.weight"] == "F32"


@pytest.mark.parametrize(
    ("dim", "heads", "factor"), [(4096, 32, 8.0), (2048, 32, 32.0)], ids=["Llama 3.1 8B", "Llama 3.2 1B"]
)
def test_factors_are_the_ratio_of_the_frequencies_in_transformers(dim: int, heads: int, factor: float) -> None:
    scaling = LLAMA3 | {"factor": factor, "original_context_length": 8192}
    shape = Model.model_validate(
        {"dim": dim, "layers": 1, "heads": heads, "kv_heads": 8, "ffn_dim": 8192, "context_length": 131072}
        | {"rope_theta": 500000.0, "rope_scaling": scaling}
    )
    config = LlamaConfig.from_dict(config_to_hugging_face(shape, 128256, 128000, 128001))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    (factors,) = rope_factors(shape).values()
    torch.testing.assert_close(factors, 1 / 500000.0**exponents / frequencies, rtol=1e-6, atol=0)
    assert factors[0] == 1 and factors[-1] == factor


def without_factors(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.release.gguf.rope_factors", lambda _: {})
    write_gguf(release / "gguf", release / "huggingface", "small")


def with_inverse_factors(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {name: 1 / tensor for name, tensor in rope_factors(shape_of("llama3")).items()}
    monkeypatch.setattr("tinyllama.release.gguf.rope_factors", lambda _: factors)
    write_gguf(release / "gguf", release / "huggingface", "small")


def with_another_linear_factor(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = gguf.GGUFWriter.add_rope_scaling_factor
    monkeypatch.setattr("gguf.GGUFWriter.add_rope_scaling_factor", lambda writer, factor: add(writer, 2 * factor))
    write_gguf(release / "gguf", release / "huggingface", "small")


def with_another_factor_in_config(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_json(release / "huggingface/config.json")
    for name in ("rope_parameters", "rope_scaling"):
        config[name]["factor"] /= 2
    write_json(release / "huggingface/config.json", config)
    write_ctranslate2(release / "ctranslate2", release / "huggingface")


@pytest.mark.parametrize(
    ("name", "plant", "formats"),
    [
        ("llama3", without_factors, {"gguf F16"}),
        ("llama3", with_inverse_factors, {"gguf F16"}),
        ("linear", with_another_linear_factor, {"gguf F16"}),
        ("llama3", with_another_factor_in_config, {"huggingface", "ctranslate2 float32"}),
        ("linear", with_another_factor_in_config, {"huggingface", "ctranslate2 float32"}),
    ],
)
def test_wrong_scaling_fails(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    plant: Callable[[Path, pytest.MonkeyPatch], None],
    formats: set[str],
) -> None:
    """With random weights, the mean loss of a text hardly depends on the frequencies, unlike single tokens."""
    release = write_release(tmp_path / "release", random_model(tokenizer.vocab_size, shape_of(name)), tokenizer, [])
    plant(release, monkeypatch)
    kind = "gguf" if "gguf F16" in formats else "ctranslate2"
    failed = failed_checks(keep_only(release, "huggingface", kind))
    assert {check.subject for check in failed if check.what == "greedy"} == formats


@pytest.mark.parametrize(
    ("parameters", "logits", "length"), [(10**6, 10**6, 640), (600, 10**6, 600), (10**6, 600, 600), (10, 10**6, None)]
)
def test_scored_text_is_as_long_as_computation_and_memory_allow(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, parameters: int, logits: int, length: int | None
) -> None:
    model = random_model(tokenizer.vocab_size, shape_of("llama3"))
    monkeypatch.setattr(verify, "MAX_SCORED_COMPUTE", parameters * num_parameters(model.config, model.vocab_size))
    monkeypatch.setattr(verify, "MAX_SCORED_LOGITS", logits * model.vocab_size)
    text = [1, *tokenizer.encode(verify.TEXT)]
    ids = compute_reference_outputs(model, tokenizer)["scored"]["ids"]
    assert len(text) < 600 and ids[: len(text)] == text
    assert len(ids) == (length or len(text))
    *beyond, _ = [*tokenizer.decode(ids[len(text) :]).split(), "a word that may be cut"]
    assert set(beyond) <= {*verify.TEXT.split(), *beyond[-1:]}
    assert not beyond or " ".join(beyond[:20]) not in " ".join(verify.TEXT.split())


def test_unscaled_model_is_verified_on_the_short_text(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer.vocab_size, shape_of("head-dim-without-groups"))
    reference = compute_reference_outputs(model, tokenizer)
    assert reference["scored"]["ids"] == [1, *tokenizer.encode(verify.TEXT)]
    assert reference["scored"]["original_context"] is None
    assert len(reference["continuations"]) == len(verify.PROMPTS)
