"""The network equals transformers' Llama; activation checkpointing saves memory and changes no number."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.errors import InputError
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_from_hugging_face, config_to_hugging_face, from_hugging_face, to_hugging_face
from tinyllama.recipe import ActivationCheckpointing, Model

VOCAB = 97
GQA = {"dim": 64, "layers": 3, "heads": 8, "kv_heads": 2, "ffn_dim": 160, "context_length": 64}
LLAMA3: Any = {
    "type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_context_length": 64,
}
CONFIGS = {
    "gqa": Model(**GQA),
    "mha": Model(**GQA | {"kv_heads": 8}),
    "tied": Model(**GQA, tie_embeddings=True),
    "other constants": Model(**GQA, norm_eps=1e-6, rope_theta=100_000.0),
    "wide heads": Model(**GQA, head_dim=16),
    "linear": Model(**GQA | {"context_length": 256}, rope_scaling={"type": "linear", "factor": 3}),
    "llama3": Model(**GQA | {"context_length": 256}, rope_scaling=LLAMA3),
    "llama3, tied, wide heads": Model(
        **GQA | {"context_length": 256}, head_dim=12, rope_theta=500_000.0, rope_scaling=LLAMA3, tie_embeddings=True
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def build(config: Model) -> Llama:
    model = Llama(config, VOCAB)
    initialize(model, seed=7)
    with torch.no_grad():  # a norm of ones would hide a missing norm
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    return model.eval()


def build_peer(config: Model) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config_to_hugging_face(config, VOCAB, 1, 2) | {"dtype": "float32"})).eval()


def token_ids(*size: int) -> Tensor:
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(3))


@every_config
@torch.no_grad()
def test_logits_equal_transformers_with_our_weights(config: Model) -> None:
    model, peer = build(config), build_peer(config)
    missing, unexpected = peer.load_state_dict(dict(to_hugging_face(model.state_dict(), config)), strict=False)
    assert not unexpected
    assert all(name == "lm_head.weight" and config.tie_embeddings for name in missing)
    ids = token_ids(2, config.context_length)
    assert (model(ids) - peer(ids).logits).abs().max() < 1e-4


@every_config
@torch.no_grad()
def test_logits_equal_transformers_with_its_weights(config: Model) -> None:
    peer = build_peer(config)
    model = Llama(*config_from_hugging_face(peer.config.to_dict())).eval()
    model.load_state_dict(dict(from_hugging_face(peer.state_dict(), config)))
    ids = token_ids(2, config.context_length)
    assert (model(ids) - peer(ids).logits).abs().max() < 1e-4


@every_config
@torch.no_grad()
def test_tokens_through_the_kv_cache_equal_transformers_complete_forward_pass(config: Model) -> None:
    model, peer, ids = build(config), build_peer(config), token_ids(1, config.context_length)
    peer.load_state_dict(dict(to_hugging_face(model.state_dict(), config)), strict=False)
    expected = peer(ids).logits
    for prefill in (1, 40, config.context_length - 10):  # below and above the original context of the scaled ones
        caches = model.new_caches(1, config.context_length)
        last = min(prefill + 40, config.context_length)
        parts = ids[:, :last].split([prefill, *[1] * (last - prefill)], dim=1)
        logits = torch.cat([model(part, caches) for part in parts], dim=1)
        assert (logits - expected[:, :last]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_scaling_changes_the_logits(name: str) -> None:
    """Otherwise the comparisons with transformers would show nothing."""
    scaled, ids = CONFIGS[name], token_ids(2, 256)
    plain = scaled.model_copy(update={"rope_scaling": None})
    assert (build(scaled)(ids) - build(plain)(ids)).abs().max() > 1e-2


@every_config
def test_number_of_parameters_equals_formula(config: Model) -> None:
    assert Llama(config, VOCAB).num_parameters == num_parameters(config, VOCAB)


@torch.no_grad()
def test_kv_cache_gives_same_logits() -> None:
    model, ids = build(CONFIGS["gqa"]), token_ids(2, 40)
    caches = model.new_caches(2, 40)
    parts = [model(part, caches) for part in ids.split([17, 1, 9, 1, 12], dim=1)]
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() < 1e-5


def test_initial_weights_depend_only_on_seed_and_name() -> None:
    first, second, other = (Llama(CONFIGS["gqa"], VOCAB) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        torch.rand(seed)  # random numbers drawn elsewhere change nothing
        initialize(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    down = dict(first.named_parameters())["blocks.0.ffn.down.weight"].detach()
    assert float(down.std()) == pytest.approx(1 / (64**0.5 * 3), rel=0.05)
    assert float(first.embedding.weight.detach().std()) == pytest.approx((0.4 / 64) ** 0.5, rel=0.05)


def test_bf16_activations_with_float32_weights_and_gradients() -> None:
    model = Llama(CONFIGS["gqa"], VOCAB, torch.bfloat16)
    initialize(model, 1)
    logits = model(torch.zeros(1, 8, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


WIDE = Model(dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=160, context_length=128)
ROWS = token_ids(4, 129)
RECOMPUTING: tuple[ActivationCheckpointing, ...] = ("selective", "full")
Gradients = dict[str, Tensor]


def build_checkpointed(
    mode: ActivationCheckpointing, compiled: bool = False, precision: torch.dtype = torch.float32
) -> Llama:
    model = Llama(WIDE, VOCAB, precision)
    initialize(model, 1)
    model.set_activation_checkpointing(mode)
    if compiled:  # as train.setup does
        torch._dynamo.reset()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    return model


def loss_and_gradients(model: Llama) -> tuple[Tensor, Gradients]:
    loss = model.loss(ROWS[:, :-1], ROWS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def forward_bytes(model: Llama) -> int:
    """Return the bytes that a forward pass allocates and keeps for the backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss = model.loss(ROWS[:, :-1], ROWS[:, 1:])
    kept = sum(event.self_cpu_memory_usage for event in measured.events() or [])
    loss.backward()
    return int(kept)


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_is_bit_identical(mode: ActivationCheckpointing, precision: torch.dtype) -> None:
    expected_loss, expected = loss_and_gradients(build_checkpointed("none", precision=precision))
    loss, found = loss_and_gradients(build_checkpointed(mode, precision=precision))
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys() == dict(build_checkpointed(mode).named_parameters()).keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_activation_checkpointing_saves_memory() -> None:
    none, selective, full = (forward_bytes(build_checkpointed(mode)) for mode in ("none", *RECOMPUTING))
    assert full < selective < none
    residual = 4 * ROWS[:, :-1].numel() * WIDE.dim
    assert full < none / 4
    assert full < (WIDE.layers + 8) * residual  # each block's input, and what precedes and follows the blocks


@pytest.fixture(scope="module")
def compiled() -> dict[ActivationCheckpointing, tuple[Tensor, Gradients, int]]:
    """Loss, gradients and forward bytes of compiled models."""
    found: dict[ActivationCheckpointing, tuple[Tensor, Gradients, int]] = {}
    for mode in RECOMPUTING:
        model = build_checkpointed(mode, compiled=True)
        found[mode] = (*loss_and_gradients(model), forward_bytes(model))  # the first call compiles
    return found


@pytest.mark.slow
def test_compiled_activation_checkpointing_changes_only_rounding(
    compiled: dict[ActivationCheckpointing, tuple[Tensor, Gradients, int]],
) -> None:
    expected_loss, expected = loss_and_gradients(build_checkpointed("none"))
    for loss, found, _ in compiled.values():
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.slow
def test_compiled_activation_checkpointing_saves_memory(
    compiled: dict[ActivationCheckpointing, tuple[Tensor, Gradients, int]],
) -> None:
    selective, full = (compiled[mode][2] for mode in RECOMPUTING)
    assert full < selective < forward_bytes(build_checkpointed("none"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"a list; give a tensor \[batch, time\]"),
        (torch.tensor([1, 2]), r"shape \[2\]; give \[batch, time\]"),
        (torch.tensor([[1.0, 2.0]]), "torch.float32; give integers"),
        (torch.tensor([[1, VOCAB]]), f"the id {VOCAB} is not in the vocabulary of {VOCAB} tokens"),
        (torch.tensor([[-1, 2]]), "the id -1 is not in the vocabulary"),
        (token_ids(1, 65), "65 tokens, but the model's context is 64"),
    ],
    ids=["list", "1-D", "float", "beyond the vocabulary", "negative", "long"],
)
def test_wrong_input_is_refused_with_the_remedy(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(CONFIGS["gqa"])(ids)


@torch.no_grad()
def test_cached_tokens_count_towards_the_context() -> None:
    model = build(CONFIGS["gqa"])
    caches = model.new_caches(1, 64)
    model(token_ids(1, 60), caches)
    with pytest.raises(InputError, match="5 tokens after 60 cached tokens"):
        model(token_ids(1, 5), caches)


@torch.no_grad()
def test_input_checks_read_no_values_of_fake_tensors_and_break_no_graph() -> None:
    model, ids = build(CONFIGS["gqa"]), token_ids(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), model(ids))
    with FakeTensorMode():
        assert Llama(CONFIGS["gqa"], VOCAB)(torch.zeros(2, 10, dtype=torch.long)).shape == (2, 10, VOCAB)
