"""Samples of a model during training: the prompts, and a greedy and a sampled completion of each prompt.

All ranks of a sharded model compute the same completions, with the same number of forward passes. The blocks run
without torch.compile, which would compile them for each length of the text.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch.nn.attention import sdpa_kernel

from tinyllama.data.store import Split, TokenStore
from tinyllama.errors import InputError
from tinyllama.model.attention import INFERENCE_KERNELS
from tinyllama.model.generation import GREEDY, Sampling, choose_token, stream_decode
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.recipe.loading import abbreviated_repr
from tinyllama.runs.samples import SAMPLE_SEED, SAMPLE_TEMPERATURE, SAMPLE_TOKENS, SAMPLE_TOP_K
from tinyllama.tokenizer import Tokenizer

_NUM_PROMPTS = 3
_MIN_CHARACTERS, _MAX_CHARACTERS = 20, 60
"""Range of the length of a prompt from the validation text."""
_DOCUMENTS_PER_SOURCE = 8
"""Number of documents of each source from which prompts are chosen."""

_SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(temperature=SAMPLE_TEMPERATURE, top_k=SAMPLE_TOP_K, seed=SAMPLE_SEED),
}
"""Options of each completion of a prompt."""


def sample_prompts(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    """Return the prompts of `train.sample_prompts`, by default the beginnings of up to three validation documents.

    The documents are from different sources if possible. Each beginning ends at the end of a line or a word. The result
    has no duplicates, and is empty without validation documents. Raises InputError if a prompt of the recipe has no
    tokens or fills the model's context, and the same errors as `Split.__getitem__`.
    """
    context = recipe.model.context_length
    if recipe.train.sample_prompts is not None:
        for prompt in recipe.train.sample_prompts:
            if not 0 < (length := len(_prompt_ids(prompt, tokenizer))) < context:
                problem = f"{abbreviated_repr(prompt)} has {length} tokens"
                raise InputError(f"train.sample_prompts: {problem}; give a prompt of 1 to {context - 1} tokens")
        return list(dict.fromkeys(recipe.train.sample_prompts))
    beginnings = (
        _document_beginnings(store[f"{name}/validation"], tokenizer, source.holdout == "tail")
        for name, source in recipe.data.sources.items()
        if f"{name}/validation" in store
    )
    by_round = itertools.chain.from_iterable(itertools.zip_longest(*beginnings))
    fitting = [text for text in by_round if text and len(_prompt_ids(text, tokenizer)) < context]
    return list(dict.fromkeys(fitting))[:_NUM_PROMPTS]


def _prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.bos_prefix + tokenizer.encode(prompt)


def _document_beginnings(split: Split, tokenizer: Tokenizer, are_tails: bool) -> Iterator[str]:
    """Yield the beginnings of documents that are spread evenly over a split; skip unsuitable documents.

    If the documents are tails of longer documents, their first line or word may be incomplete, and is skipped.
    """
    count = min(len(split), _DOCUMENTS_PER_SOURCE)
    for number in range(count):
        ids = split[number * len(split) // count]
        # A token is at least one byte, so these tokens contain the beginning unless the document is shorter.
        text = tokenizer.decode(ids[: 2 * 4 * _MAX_CHARACTERS])
        texts = [text.partition("\n")[2], text.partition(" ")[2]] if are_tails else [text]
        if beginning := next(filter(None, map(_beginning, texts)), None):
            yield beginning


def _beginning(text: str) -> str | None:
    """Return the first line of a text, or else its first words: _MIN_CHARACTERS to _MAX_CHARACTERS characters.

    The beginning is at most half of the text, so that the model can complete the rest. Return None if the text is too
    short, or if its beginning contains bytes that are not UTF-8 or control characters.
    """
    text = "".join(itertools.takewhile(_is_readable, text.replace("\r\n", "\n").strip()))
    limit = min(_MAX_CHARACTERS, len(text) // 2)
    if limit < _MIN_CHARACTERS:
        return None
    line = text.partition("\n")[0].rstrip()
    if _MIN_CHARACTERS <= len(line) <= limit:
        return line
    words = re.match(rf"(?s).{{{_MIN_CHARACTERS},{limit}}}(?<=\S)(?!\S)|.{{{limit}}}(?<=\S)", text)
    return words[0] if words else None


def _is_readable(character: str) -> bool:
    is_space = character in "\n\t" or unicodedata.category(character) == "Zs"  # such as a no-break space
    return is_space or (character.isprintable() and character != "\N{REPLACEMENT CHARACTER}")


@torch.no_grad()
def complete_prompts(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    is_compiled: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[dict[str, str]]:
    """Return `prompt`, `greedy` and `sampled` for each prompt; the last two are the texts of the completions.

    A completion ends before EOS, after SAMPLE_TOKENS tokens, or at the end of the context. `is_compiled` is whether the
    model's blocks are compiled. `heartbeat` is called after each forward pass.
    """
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        return [_complete_prompt(model, tokenizer, prompt, heartbeat) for prompt in prompts]


def _complete_prompt(model: Llama, tokenizer: Tokenizer, prompt: str, heartbeat: Callable[[], None]) -> dict[str, str]:
    """Complete one prompt; the number of forward passes does not depend on the completions.

    Otherwise, a rank whose completions end early would not take part in the other ranks' forward passes.
    """
    prompt_ids, device = _prompt_ids(prompt, tokenizer), model.device
    num_tokens = min(SAMPLE_TOKENS, model.config.context_length - len(prompt_ids))
    caches = model.new_caches(len(_SAMPLINGS), len(prompt_ids) + num_tokens)
    random = torch.Generator(device).manual_seed(SAMPLE_SEED)
    rows = [list(prompt_ids) for _ in _SAMPLINGS]
    ids = torch.tensor(rows, device=device)
    for _ in range(num_tokens):
        with sdpa_kernel(INFERENCE_KERNELS):
            logits = model.next_logits(ids, caches).float()
        logits = logits.nan_to_num(0.0, 1e5, -1e5)  # sampling from NaN would end the process
        for row, own_logits, sampling in zip(rows, logits, _SAMPLINGS.values(), strict=True):
            row.append(choose_token(own_logits, sampling, random))
        ids = torch.tensor([row[-1:] for row in rows], device=device)
        heartbeat()
    tokens = (itertools.takewhile(lambda token: token != tokenizer.eos_id, row[len(prompt_ids) :]) for row in rows)
    texts = ("".join(stream_decode(tokenizer, prompt_ids, completion)) for completion in tokens)
    return {"prompt": prompt, **dict(zip(_SAMPLINGS, texts, strict=True))}
