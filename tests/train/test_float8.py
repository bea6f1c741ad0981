"""Float8 products: close to bf16 over float32 weights, and refused where the device has none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.single_process import build_state, load_recipe
from torch import Tensor

from tinyllama.distributed import World
from tinyllama.errors import InputError
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model
from tinyllama.train.setup import enable_float8

SHAPE = Model(dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128, context_length=64)
VOCAB_SIZE = 96
SEQUENCES = torch.randint(VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> World:
    """A rank with an H100, whose float8 products torchao emulates on the CPU."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.float8 import Float8LinearConfig

    from_recipe_name = Float8LinearConfig.from_recipe_name

    def emulated(name: str) -> object:
        return replace(from_recipe_name(name), emulate=True)

    monkeypatch.setattr(Float8LinearConfig, "from_recipe_name", staticmethod(emulated))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return World(0, 1, torch.device("cuda"))


def bf16_model() -> Llama:
    model = Llama(SHAPE, VOCAB_SIZE, torch.bfloat16)
    initialize(model, 1)
    return model


def float8_model(world: World) -> Llama:
    model = bf16_model()
    enable_float8(model, world)
    return model


def loss_and_gradients(model: Llama) -> tuple[float, dict[str, Tensor]]:
    loss = model.loss(SEQUENCES[:, :-1], SEQUENCES[:, 1:])
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_only_matrices_of_the_blocks_are_converted(h100: World) -> None:
    model = float8_model(h100)
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    matrices = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")
    assert converted == {f"blocks.{layer}.{name}" for layer in range(2) for name in matrices}
    assert model.state_dict().keys() == bf16_model().state_dict().keys()  # either loads the other's checkpoint


def test_loss_and_gradients_are_close_to_bf16(h100: World) -> None:
    model = float8_model(h100)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(bf16_model())
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert loss != expected_loss
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in gradients.values()} == {torch.float32}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0) > 0.97, name


def test_cpu_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"^train\.float8: cpu"):
        build_state(load_recipe(small, **{"train.float8": True, "train.compile": True}))


def test_float8_without_compile_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: train: float8 .*compile"):
        load_recipe(small, **{"train.float8": True, "train.compile": False})
