"""Hugging Face folders load in transformers without extra code and are the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinyllama.files import read_json
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.release.release import release_run, write_hugging_face

TEXTS = ["The file is opened.", "def main():\n    return  [1, 23]\n", "  two  spaces", "café 日本 \U0001f999"]


SCALING = {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4, "original_context_length": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_embeddings": True},
    "mha": {"kv_heads": 4},
    "llama3": {"tie_embeddings": True, "head_dim": 24, "rope_scaling": SCALING},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3}},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def folder(request: pytest.FixtureRequest, make_run: Callable[..., Path]) -> Path:
    return release_run(make_run(**request.param)) / "huggingface"


@torch.no_grad()
def test_logits_in_transformers_equal_the_checkpoints(folder: Path) -> None:
    ours = load_model(folder.parents[2])
    for parameter in ours.parameters():
        parameter.copy_(parameter.bfloat16())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(ours.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # otherwise the comparison would show little


def test_token_ids_in_transformers_equal_ours(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder.parent), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == [ours.bos_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.model_max_length == 128


def test_configurations_have_context_and_special_tokens(folder: Path) -> None:
    config, generation = read_json(folder / "config.json"), GenerationConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder.parent)
    assert config["max_position_embeddings"] == load_model(folder.parent).config.context_length
    for special in (config, vars(generation)):
        assert (special["bos_token_id"], special["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)


@torch.no_grad()
def test_sharded_weights_load_as_the_same_model(released: Path, tmp_path: Path) -> None:
    model = load_model(released)
    write_hugging_face(tmp_path / "sharded", model, load_tokenizer(released), shard_bytes=60_000)
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 100_000 for path in shards)  # an embedding of 600 x 64 is 77 kB, alone in one
    assert not (tmp_path / "sharded/model.safetensors").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    ids = torch.arange(50)[None]
    assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4
    assert torch.equal(load_model(tmp_path / "sharded")(ids), model(ids))
