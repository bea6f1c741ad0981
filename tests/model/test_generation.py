"""Generation follows the model: greedily its likeliest token, drawn only from where it was told to draw."""

import pytest
import torch

from tinyllama.errors import InputError
from tinyllama.model.generation import generate, sample_token
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Model

SHAPE = Model(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, context_length=24)


@pytest.fixture
def model() -> Llama:
    model = Llama(SHAPE, 50)
    initialize(model, 3)
    return model.eval()


@torch.no_grad()
def test_greedy_generation_equals_reading_the_whole_text_each_time(model: Llama) -> None:
    ids = [1, 7, 9]
    for token in generate(model, [1, 7, 9], 10):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 13


def test_it_ends_at_the_stop_token_and_at_the_context(model: Llama) -> None:
    free = list(generate(model, [1, 7, 9], 100))
    assert len(free) == SHAPE.context_length - 3
    assert list(generate(model, [1, 7, 9], 100, stop_id=free[4])) == free[: free.index(free[4])]


def test_draws_follow_the_seed_and_stay_among_the_top_k() -> None:
    logits = torch.linspace(0, 3, 50)
    drawn = [sample_token(logits, 5.0, 3, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert set(drawn) == {47, 48, 49}
    assert drawn == [sample_token(logits, 5.0, 3, torch.Generator().manual_seed(seed)) for seed in range(100)]


@pytest.mark.parametrize("length", [0, 24, 30])
def test_a_prompt_that_leaves_no_room_is_refused(model: Llama, length: int) -> None:
    with pytest.raises(InputError, match=f"the prompt has {length} tokens; give between 1 and 23"):
        next(generate(model, [1] * length, 5))
