"""Generation follows the model's logits, its options and its limits."""

import pytest
import torch

from tinyllama.errors import InputError
from tinyllama.model.generation import generate, sample_token
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model

CONFIG = Model(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, context_length=24)


@pytest.fixture
def model() -> Llama:
    model = Llama(CONFIG, 50)
    initialize(model, 3)
    return model.eval()


@torch.no_grad()
def test_greedy_generation_equals_generation_without_a_cache(model: Llama) -> None:
    ids = [1, 7, 9]
    for token in generate(model, [1, 7, 9], 10):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 13


def test_generation_ends_at_stop_id_and_context(model: Llama) -> None:
    unlimited = list(generate(model, [1, 7, 9], 100))
    assert len(unlimited) == CONFIG.context_length - 3
    assert list(generate(model, [1, 7, 9], 100, stop_id=unlimited[4])) == unlimited[: unlimited.index(unlimited[4])]


def test_samples_are_reproducible_and_within_top_k() -> None:
    logits = torch.linspace(0, 3, 50)
    samples = [sample_token(logits, 5.0, 3, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert set(samples) == {47, 48, 49}
    assert samples == [sample_token(logits, 5.0, 3, torch.Generator().manual_seed(seed)) for seed in range(100)]


@pytest.mark.parametrize("length", [0, 24, 30])
def test_prompt_must_leave_room_in_the_context(model: Llama, length: int) -> None:
    with pytest.raises(InputError, match=f"prompt: {length} tokens"):
        next(generate(model, [1] * length, 5))
