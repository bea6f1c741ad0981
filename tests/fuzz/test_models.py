"""An edited Hugging Face folder loads, or is refused in one line."""

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
    edited,
    edited_documents,
    edits_of_bytes,
    fixed_examples,
    shared_folder,
)

from tinyllama.errors import InputError
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.recipe import Model

WEIGHTS = "model.safetensors"


@cache
def valid_model() -> Path:
    """A very small Llama. Read only."""
    shape = Model(dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=8, context_length=16)
    model = Llama(shape, 20)
    initialize(model, 3)
    folder = shared_folder()
    tensors = dict(to_hugging_face(model.state_dict(), shape))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(shape, 20, 1, 2)))
    return folder


def config(**changes: Any) -> Any:
    return json.loads((valid_model() / "config.json").read_bytes()) | changes


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


@fixed_examples(50)
@example(config(num_hidden_layers=10**9))  # a billion blocks were built before the files were read
@example(config(intermediate_size=10**9))
@example(config(vocab_size=1 << 63))  # too large for torch: a traceback
@example(config(rope_parameters=1))  # a traceback
@example(config(quantization_config=1))  # a traceback
@given(st.deferred(lambda: edited_documents(config())))
def test_any_config_json_loads_or_is_refused(document: Any) -> None:
    """Examples: found 2026-11-24."""
    check("config.json", json.dumps(document).encode())


@fixed_examples(50)
@given(edits_of_bytes)
def test_edited_weights_load_or_are_refused(edits: Any) -> None:
    weights = (valid_model() / WEIGHTS).read_bytes()
    check(WEIGHTS, edited(weights, [(place % 900, *rest) for place, *rest in edits]))
