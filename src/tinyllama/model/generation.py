"""Text generation: one token at a time with a KV cache, and incremental decoding of the tokens to text."""

from collections.abc import Iterable, Iterator

import torch
from torch.nn.attention import sdpa_kernel

from tinyllama.errors import InputError
from tinyllama.model.attention import INFERENCE_KERNELS
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
    """Yield up to `max_new_tokens` ids that continue `prompt`, until `stop_id` or the end of the context.

    Temperature 0 selects the most likely token; otherwise each token is sampled from the `top_k` most likely tokens.
    Raises InputError if the prompt is empty or fills the context, or if an option is out of range.
    """
    if not (0 <= temperature < float("inf")) or (top_k is not None and top_k < 1) or max_new_tokens < 1:
        raise InputError(
            f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}: out of range; "
            "give a temperature of at least 0, and a top_k and max_new_tokens of at least 1"
        )
    context = model.config.context_length
    if not 0 < len(prompt) < context:
        raise InputError(
            f"prompt: {len(prompt)} tokens, but the model's context is {context}; give between 1 and {context - 1}"
        )
    random = torch.Generator().manual_seed(seed)
    caches = model.new_caches(1, context)
    ids = torch.tensor([prompt], device=model.embedding.weight.device)
    for _ in range(min(max_new_tokens, context - len(prompt))):
        with sdpa_kernel(INFERENCE_KERNELS):
            logits = model.logits(model.hidden_states(ids, caches)[:, -1])[0].float().cpu()
        token = sample_token(logits, temperature, top_k, random)
        if token == stop_id:
            return
        yield token
        ids = torch.tensor([[token]], device=ids.device)


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """Sample the next token's id from logits float32[V]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))


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
