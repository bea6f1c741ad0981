"""Weights and configurations convert to Hugging Face's names and back."""

import pytest
import torch

from tinyllama.errors import InputError
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_from_hugging_face, config_to_hugging_face, from_hugging_face, to_hugging_face
from tinyllama.recipe import Model

VOCAB = 97
CONFIG = Model(dim=64, layers=3, heads=8, kv_heads=2, ffn_dim=160, context_length=64)


def hugging_face_weights(config: Model) -> tuple[Llama, dict[str, torch.Tensor]]:
    model = Llama(config, VOCAB)
    initialize(model, seed=7)
    return model, dict(to_hugging_face(model.state_dict(), config))


@pytest.mark.parametrize(
    "change", [{}, {"kv_heads": 8}, {"tie_embeddings": True}, {"norm_eps": 1e-6, "rope_theta": 100_000.0}]
)
def test_configuration_and_weights_survive_a_round_trip(change: dict[str, object]) -> None:
    config = CONFIG.model_copy(update=change)
    assert config_from_hugging_face(config_to_hugging_face(config, VOCAB, 1, 2)) == (config, VOCAB)
    model, weights = hugging_face_weights(config)
    state = dict(from_hugging_face(weights, config))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_missing_and_unknown_tensors_are_named() -> None:
    _, weights = hugging_face_weights(CONFIG)
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(InputError, match=bias):
        from_hugging_face(weights | {bias: torch.zeros(64)}, CONFIG)
    del weights["model.norm.weight"]
    with pytest.raises(InputError, match=r"lack model\.norm\.weight"):
        from_hugging_face(weights, CONFIG)
