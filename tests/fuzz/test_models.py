"""A mutated Hugging Face folder loads, or is refused in one line."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.fuzz.strategies import (
    assert_one_line,
    fixed_examples,
    mutate,
    mutated_documents,
    mutations,
    shared_folder,
    values,
)

from tinyllama.errors import InputError
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.recipe import Model


@cache
def valid_model() -> Path:
    """A very small Llama. Read only."""
    shape = Model(dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, context_length=16)
    model = Llama(shape, 20)
    initialize(model, 3)
    folder = shared_folder()
    save_file(
        {name: value.contiguous() for name, value in to_hugging_face(model.state_dict(), shape)}, folder / WEIGHTS
    )
    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(shape, 20, 1, 2)))
    return folder


WEIGHTS = "model.safetensors"


def config() -> Any:
    return json.loads((valid_model() / "config.json").read_bytes())


def check(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-") as folder:
        own = Path(shutil.copytree(valid_model(), Path(folder) / "model"))
        (own / name).write_bytes(content)
        try:
            model = load_model(own)
        except InputError as error:
            assert_one_line(error)
        else:
            assert model(torch.zeros(1, 2, dtype=torch.long)).shape[:2] == (1, 2)


def with_large(field: str) -> Any:
    return config() | {field: 10**9}


@fixed_examples(50)
@example(with_large("num_hidden_layers"))  # a billion blocks were built before the files were read
@example(with_large("intermediate_size"))
@example(config() | {"vocab_size": 1 << 63})  # too large for torch: a traceback
@example(config() | {"rope_parameters": 1})  # a traceback
@example(config() | {"quantization_config": 1})  # a traceback
@given(st.deferred(lambda: mutated_documents(config()) | values))
def test_any_config_json_loads_or_is_one_line(document: Any) -> None:
    """Examples: found 2026-11-24."""
    check("config.json", json.dumps(document).encode())


@fixed_examples(50)
@given(mutations)
def test_mutated_weights_load_or_are_one_line(edits: Any) -> None:
    check(
        WEIGHTS, mutate((valid_model() / WEIGHTS).read_bytes(), [(what, place % 900, by) for what, place, by in edits])
    )
