"""Computing activations again saves memory and changes no number."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tinyllama.model.activation_checkpointing import Recompute
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model

SHAPE = Model(dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=160, context_length=128)
VOCAB = 97
ROWS = torch.randint(VOCAB, (4, 129), generator=torch.Generator().manual_seed(3))
RECOMPUTING: tuple[Recompute, Recompute] = ("selective", "full")


def built(how: Recompute, compiled: bool = False, precision: torch.dtype = torch.float32) -> Llama:
    """A model as the engine builds it."""
    model = Llama(SHAPE, VOCAB, precision)
    initialize(model, 1)
    model.set_activation_checkpointing(how)
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    return model


def loss_of(model: Llama) -> Tensor:
    return model.loss(ROWS[:, :-1], ROWS[:, 1:])


def gradients(model: Llama) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held_bytes(model: Llama) -> int:
    """What the forward pass has allocated and not freed at its end, as the allocator counts it."""
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss = loss_of(model)
    held = sum(event.self_cpu_memory_usage for event in measured.events() or [])
    loss.backward()
    return int(held)


@pytest.mark.parametrize("how", RECOMPUTING)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_the_same_bit_for_bit(how: Recompute, precision: torch.dtype) -> None:
    wanted_loss, wanted = gradients(built("none", precision=precision))
    loss, found = gradients(built(how, precision=precision))
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys() == dict(built(how).named_parameters()).keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_full_holds_less_than_selective_and_that_less_than_none() -> None:
    none, selective, full = (held_bytes(built(how)) for how in ("none", *RECOMPUTING))
    assert full < selective < none
    residual = 4 * ROWS[:, :-1].numel() * SHAPE.dim
    assert full < none / 4
    assert full < (SHAPE.layers + 8) * residual  # each block's input, and what comes before and after the blocks


@pytest.fixture(scope="module")
def compiled() -> dict[Recompute, tuple[Tensor, dict[str, Tensor], int]]:
    """Loss, gradients and held bytes of compiled models that compute again."""
    found: dict[Recompute, tuple[Tensor, dict[str, Tensor], int]] = {}
    for how in RECOMPUTING:
        model = built(how, compiled=True)
        found[how] = (*gradients(model), held_bytes(model))  # in this order: the first time is compilation
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", RECOMPUTING)
def test_compiled_it_changes_only_rounding(
    how: Recompute, compiled: dict[Recompute, tuple[Tensor, dict[str, Tensor], int]]
) -> None:
    wanted_loss, wanted = gradients(built("none"))
    loss, found, _ = compiled[how]
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.slow
def test_compiled_full_holds_less_than_selective_and_that_less_than_none(
    compiled: dict[Recompute, tuple[Tensor, dict[str, Tensor], int]],
) -> None:
    selective, full = (compiled[how][2] for how in RECOMPUTING)
    assert full < selective < held_bytes(built("none"))
