"""Generation follows the model's logits, its options and its limits."""

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as warp

from tinyllama.errors import InputError
from tinyllama.model.generation import Sampling, choose_token, generate, penalize_repetition, restrict
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
    logits, sampling = torch.linspace(0, 3, 50), Sampling(temperature=5.0, top_k=3)
    samples = [choose_token(logits, sampling, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert set(samples) == {47, 48, 49}
    assert samples == [choose_token(logits, sampling, torch.Generator().manual_seed(seed)) for seed in range(100)]


def test_seed_determines_the_sampled_continuation(model: Llama) -> None:
    def sample(seed: int) -> list[int]:
        return list(generate(model, [1, 7, 9], 20, Sampling(temperature=1.0, seed=seed)))

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("top_k", [None, 1, 7, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-9])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_kept_tokens_and_logits_equal_those_of_transformers(top_k: int | None, top_p: float, min_p: float) -> None:
    warpers = [warp.TemperatureLogitsWarper(0.7), warp.TopPLogitsWarper(top_p), warp.MinPLogitsWarper(min_p)]
    if top_k is not None:
        warpers.insert(1, warp.TopKLogitsWarper(top_k))
    rows = 3 * torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    rows[0] = 0  # all tokens are equally probable
    expected = rows
    for one in warpers:
        expected = one(torch.zeros(50, 1, dtype=torch.long), expected)
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(torch.stack([restrict(row, sampling) for row in rows]), expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits, seen = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 9, 5, 100, 9])
    expected = warp.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


@torch.no_grad()
def test_repetition_penalty_applies_to_prompt_and_generated_tokens(model: Llama) -> None:
    ids = [1, 7, 9]
    for token in generate(model, [1, 7, 9], 15, Sampling(repetition_penalty=1e6)):
        assert token not in ids
        ids.append(token)
    assert len(ids) == 18


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("inf")), ("temperature", float("nan")), ("top_k", 0),
        ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0), ("seed", -1),
        ("seed", 2**63),
    ],
)  # fmt: skip
def test_sampling_options_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field}: {value} is out of range"):
        Sampling(**{field: value})


@pytest.mark.parametrize("length", [0, 24, 30])
def test_prompt_must_leave_room_in_the_context(model: Llama, length: int) -> None:
    with pytest.raises(InputError, match=f"prompt: {length} tokens"):
        next(generate(model, [1] * length, 5))
