"""The network is Llama 2's, number for number."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.errors import InputError
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_from_hugging_face, config_to_hugging_face, from_hugging_face, to_hugging_face
from tinyllama.recipe import Model

VOCAB = 97
GQA = {"dim": 64, "layers": 3, "heads": 8, "kv_heads": 2, "ffn_dim": 160, "context_length": 64}
SHAPES = {
    "gqa": Model(**GQA),
    "mha": Model(**GQA | {"kv_heads": 8}),
    "tied": Model(**GQA, tie_embeddings=True),
    "other constants": Model(**GQA, norm_eps=1e-6, rope_theta=100_000.0),
}


def built(shape: Model) -> Llama:
    model = Llama(shape, VOCAB)
    initialize(model, seed=7)
    with torch.no_grad():  # away from their initial ones, so that a norm left out would be seen
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    return model.eval()


def peer_of(shape: Model) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config_to_hugging_face(shape, VOCAB, 1, 2) | {"dtype": "float32"})).eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_transformers_with_our_weights_in_its_model(shape: Model) -> None:
    model, peer = built(shape), peer_of(shape)
    missing, unexpected = peer.load_state_dict(dict(to_hugging_face(model.state_dict(), shape)), strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" and shape.tie_embeddings for name in missing)
    ids = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
    assert (model(ids) - peer(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_transformers_with_its_weights_in_our_model(shape: Model) -> None:
    peer = peer_of(shape)
    model = Llama(config_from_hugging_face(peer.config.to_dict()), VOCAB).eval()
    model.load_state_dict(dict(from_hugging_face(peer.state_dict(), shape)))
    ids = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(1))
    assert (model(ids) - peer(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_survives_the_way_to_hugging_face_and_back(shape: Model) -> None:
    assert config_from_hugging_face(config_to_hugging_face(shape, VOCAB, 1, 2)) == shape
    model = built(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape, VOCAB)
    state = dict(from_hugging_face(dict(to_hugging_face(model.state_dict(), shape)), shape))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_the_cache_gives_the_same_logits_as_reading_everything_at_once() -> None:
    model = built(SHAPES["gqa"])
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    caches = model.new_caches(2, 40)
    parts = [model(part, caches) for part in ids.split([17, 1, 9, 1, 12], dim=1)]
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() < 1e-5


def test_initial_weights_depend_on_the_seed_and_the_name_alone() -> None:
    first, second, other = (Llama(SHAPES["gqa"], VOCAB) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        torch.rand(seed)  # draws elsewhere change nothing
        initialize(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert float(dict(first.named_parameters())["blocks.0.ffn.down.weight"].detach().std()) == pytest.approx(
        1 / (64**0.5 * 3), rel=0.05
    )
    assert float(first.embedding.weight.detach().std()) == pytest.approx((0.4 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gpt_neox"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope type"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_what_is_not_a_llama_2_is_refused_by_name(change: dict[str, object], field: str) -> None:
    config = config_to_hugging_face(SHAPES["gqa"], VOCAB, 1, 2) | change
    with pytest.raises(InputError, match=field):
        config_from_hugging_face(config)


def test_missing_and_foreign_tensors_are_named() -> None:
    shape = SHAPES["gqa"]
    state = dict(to_hugging_face(built(shape).state_dict(), shape))
    with pytest.raises(InputError, match=r"hold model.layers.0.self_attn.q_proj.bias"):
        from_hugging_face(state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, shape)
    del state["model.norm.weight"]
    with pytest.raises(InputError, match=r"lack model.norm.weight"):
        from_hugging_face(state, shape)


def test_bf16_activations_leave_float32_weights_and_gradients() -> None:
    model = Llama(SHAPES["gqa"], VOCAB, torch.bfloat16)
    initialize(model, 1)
    logits = model(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
