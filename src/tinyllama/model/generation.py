"""Completing text, one token at a time, with the keys and values of what was read kept."""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from tinyllama.errors import InputError
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.model.llama import Llama
from tinyllama.tokenizer import Tokenizer


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop_id: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt`; ends at `stop_id` or at the end of the context.

    Temperature 0 takes the likeliest token; otherwise draws from the `top_k` likeliest at that temperature.
    Raises InputError where the prompt is empty or fills the context, or an option is out of its range.
    """
    if not (0 <= temperature < float("inf")) or (top_k is not None and top_k < 1) or max_new_tokens < 1:
        raise InputError(
            f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}: "
            "give a temperature from 0 up, and a top_k and max_new_tokens from 1 up"
        )
    room = model.shape.context_length - len(prompt)
    if not prompt or room <= 0:
        raise InputError(
            f"the prompt has {len(prompt)} tokens; give between 1 and {model.shape.context_length - 1}, "
            f"what the model's context of {model.shape.context_length} leaves room after"
        )
    random = torch.Generator().manual_seed(seed)
    caches = model.new_caches(1, model.shape.context_length)
    ids = torch.tensor([prompt], device=model.embedding.weight.device)
    for _ in range(min(max_new_tokens, room)):
        logits = model.logits(model.hidden(ids, caches)[:, -1])[0].float().cpu()
        token = sample_token(logits, temperature, top_k, random)
        if token == stop_id:
            return
        yield token
        ids = torch.tensor([[token]], device=ids.device)


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """Choose the next token from logits float32[V]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))


def complete(
    source: str,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Load a model (see `model.loading.locate`) and yield the prompt and then its continuation, piece by piece."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = tokenizer.bos_prefix + tokenizer.encode(prompt)
    tokens = generate(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, stop_id=tokenizer.eos_id, seed=seed
    )
    for first in tokens:  # only with it is it sure that there is something to add to
        yield prompt
        yield from stream_decode(tokenizer, ids, chain([first], tokens))


def stream_decode(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield what `tokens` add to the text of the ids `prompt`, as soon as no token can change it any more.

    Together it is what decoding all ids at once adds; bytes that make no character are U+FFFD each. Such bytes in
    `tokens` do not reach back into the prompt's last character, as they would there.
    """
    ids = list(prompt)
    while ids and ids[-1] in tokenizer.incomplete_ids:
        ids.pop()
    said = text = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if token not in tokenizer.incomplete_ids and not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    if text != said:
        yield text[len(said) :]
