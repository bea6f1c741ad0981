"""Text generation: one token at a time with a KV cache, and incremental decoding of the tokens to text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from torch.nn.attention import sdpa_kernel

from tinyllama.errors import InputError
from tinyllama.model.attention import INFERENCE_KERNELS
from tinyllama.model.llama import Llama, check_ids
from tinyllama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """Options for the choice of the next token. The default is greedy: the most probable token.

    Raises InputError if a value is out of range.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 chooses the most probable token."""
    top_k: int | None = None
    """Number of most probable tokens to choose from; None means all."""
    top_p: float = 1.0
    """Total probability of the most probable tokens to choose from (Holtzman et al. 2019, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Minimum probability of a token, as a fraction of the largest one (Nguyen et al. 2024, arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Factor that reduces the logits of tokens in the prompt or the text so far (Keskar et al. 2019, arXiv:1909.05858).
    Positive logits are divided by it, negative logits are multiplied by it; 1 changes nothing."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not (isinstance(number, Real) or (name == "top_k" and number is None)):
                raise InputError(f"{name}: {number!r} is of type {type(number).__name__}; give a number")
        limits: dict[str, tuple[float, bool, str]] = {
            "temperature": (self.temperature, 0 <= self.temperature < math.inf, "a number of at least 0, such as 0.8"),
            "top_k": (self.top_k or 0, self.top_k is None or self.top_k >= 1, "a number of tokens of at least 1"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "a probability above 0 and at most 1, such as 0.95"),
            "min_p": (self.min_p, 0 <= self.min_p <= 1, "a fraction of 0 to 1, such as 0.05"),
            "repetition_penalty": (
                self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "a factor above 0, such as 1.1"
            ),
            "seed": (self.seed, 0 <= self.seed < 2**63, "an integer of 0 to 2^63 - 1"),
        }  # fmt: skip
        for name, (value, is_valid, expected) in limits.items():
            if not is_valid:
                raise InputError(f"{name}: {value} is out of range; give {expected}")


GREEDY = Sampling()


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt`, until `stop_id` or the end of the context.

    Raises InputError if the prompt is empty, fills the context or has an id that is not in the vocabulary, or if
    `max_new_tokens` is less than 1.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens} is out of range; give at least 1")
    context = model.config.context_length
    if not 0 < len(prompt) < context:
        raise InputError(
            f"prompt: {len(prompt)} tokens, but the model's context is {context}; give between 1 and {context - 1}"
        )
    ids = torch.tensor([prompt])
    check_ids(ids, model.vocab_size, context)  # on the CPU, because the ids of a tensor on a GPU are not checked
    device = model.device
    random = torch.Generator(device).manual_seed(sampling.seed)
    num_tokens = min(max_new_tokens, context - len(prompt))
    caches = model.new_caches(1, len(prompt) + num_tokens)
    ids = ids.to(device)
    seen = ids[0]
    for _ in range(num_tokens):
        with sdpa_kernel(INFERENCE_KERNELS):
            logits = model.next_logits(ids, caches)[0].float()
        token = choose_token(penalize_repetition(logits, seen, sampling.repetition_penalty), sampling, random)
        if token == stop_id:
            return
        yield token
        ids = torch.tensor([[token]], device=device)
        seen = torch.cat([seen, ids[0]])


def choose_token(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """Choose the next token's id from logits float32[V]; `random` is on the device of the logits."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(restrict(logits, sampling).softmax(-1), 1, generator=random))


def restrict(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Divide logits float32[V] by the temperature, and set those of excluded tokens to minus infinity.

    Top-k, top-p and min-p apply in this order, as in transformers, each one to the remaining tokens.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        is_tail = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        is_tail[-1] = False
        logits = logits.index_fill(0, order[is_tail], -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    return logits


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits float32[V] with those of the ids `seen` reduced; see `Sampling.repetition_penalty`."""
    if penalty == 1:
        return logits
    own = logits[seen]
    return logits.index_copy(0, seen, torch.where(own < 0, own * penalty, own / penalty))


def stream_decode(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that `tokens` add to the prompt, as soon as no later token can change this text.

    The concatenated texts equal the text that decoding all ids at once adds to the prompt's text. Each byte that is not
    part of a valid character becomes one U+FFFD. Byte tokens at the prompt's end are not decoded together with new
    tokens, so a new token never changes the prompt's last character.
    """
    ids = list(prompt)
    while ids and ids[-1] in tokenizer.incomplete_ids:
        ids.pop()
    yielded = text = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if token not in tokenizer.incomplete_ids and not text.endswith("\ufffd"):
            yield text[len(yielded) :]
            yielded = text
    if text != yielded:
        yield text[len(yielded) :]
