"""Float8 products stay near bf16's, over float32 weights; where there are none, one line says so."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.single_process import build_state
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model, Recipe
from tinyllama.train import setup
from tinyllama.train.distributed import World

SHAPE = Model(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, context_length=64)
VOCAB = 96
ROWS = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> World:
    """A rank of an H100's, to whose products torchao's own emulation on the CPU gives the numbers."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.float8 import Float8LinearConfig

    named = Float8LinearConfig.from_recipe_name

    def emulated(name: str) -> object:
        return replace(named(name), emulate=True)

    monkeypatch.setattr(Float8LinearConfig, "from_recipe_name", staticmethod(emulated))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return World(0, 1, torch.device("cuda"))


def of_bf16() -> Llama:
    model = Llama(SHAPE, VOCAB, torch.bfloat16)
    initialize(model, 1)
    return model


def of_float8(ranks: World) -> Llama:
    model = of_bf16()
    setup.enable_float8(model, ranks)
    return model


def gradients(model: Llama) -> tuple[float, dict[str, Tensor]]:
    loss = model.loss(ROWS[:, :-1], ROWS[:, 1:])
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_blocks_matrices_and_no_others_are_multiplied_in_float8(a_gpu_that_has_it: World) -> None:
    model = of_float8(a_gpu_that_has_it)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    converted = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    matrices = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    assert converted == {f"blocks.{layer}.{name}" for layer in range(2) for name in matrices}
    assert model.state_dict().keys() == of_bf16().state_dict().keys()  # a checkpoint of either loads in the other


def test_loss_and_gradients_are_near_bf16s_over_float32_weights(a_gpu_that_has_it: World) -> None:
    model = of_float8(a_gpu_that_has_it)
    loss, found = gradients(model)
    wanted_loss, wanted = gradients(of_bf16())
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    assert loss != wanted_loss
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in found.values()} == {torch.float32}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.97, name


def test_it_learns_as_bf16_does(a_gpu_that_has_it: World) -> None:
    ends = []
    for model in (of_float8(a_gpu_that_has_it), of_bf16()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(6):
            loss, _ = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss / ROWS[:, 1:].numel())
    assert ends[1] < 4.4  # 4.7 at first
    assert ends[0] == pytest.approx(ends[1], rel=2e-2)


def test_a_cpu_refuses_it_in_one_line(small: Path) -> None:
    with pytest.raises(InputError, match=r"^train\.float8: cpu has no float8 products.*remove it$"):
        build_state(Recipe.load(small / "recipe.yaml", {"train.float8": True}))
