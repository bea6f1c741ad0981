"""Samples of a model during training: the prompts, and a greedy and a sampled completion of each prompt."""

import itertools
import re
from collections.abc import Iterator

from tinyllama.data.store import Split, TokenStore
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer

_NUM_PROMPTS = 3
_MIN_CHARACTERS, _MAX_CHARACTERS = 20, 60
"""Range of the length of a prompt from the validation text."""
_DOCUMENTS_PER_SOURCE = 8
"""Number of documents of each source from which prompts are chosen."""


def sample_prompts(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    """Return the prompts of `train.sample_prompts`, by default the beginnings of up to three validation documents.

    The documents are from different sources if possible. Each beginning ends at the end of a line or a word. The result
    has no duplicates, and is empty without validation documents. Raises the same errors as `Split.find_documents`.
    """
    if recipe.train.sample_prompts is not None:
        return list(dict.fromkeys(recipe.train.sample_prompts))
    names = [f"{source}/validation" for source in recipe.data.sources]
    beginnings = (_document_beginnings(store[name], tokenizer) for name in names if name in store)
    by_round = itertools.zip_longest(*beginnings)
    return list(dict.fromkeys(filter(None, itertools.chain.from_iterable(by_round))))[:_NUM_PROMPTS]


def _document_beginnings(split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of documents that are spread evenly over a split; skip unsuitable documents."""
    count = min(split.num_documents, _DOCUMENTS_PER_SOURCE)
    for document in split.find_documents(i * split.num_documents // count for i in range(count)):
        # A token is at least one byte, so these tokens contain the beginning unless the document is shorter.
        num_tokens = min(document.tokens, 2 * 4 * _MAX_CHARACTERS)
        text = tokenizer.decode(split.read(document.start, document.start + num_tokens))
        if beginning := _beginning(text):
            yield beginning


def _beginning(text: str) -> str | None:
    """Return the first line of a text, or else its first words: _MIN_CHARACTERS to _MAX_CHARACTERS characters.

    The beginning is at most half of the text, so that something is left to complete. Return None if the text is too
    short, or if its beginning contains bytes that are not UTF-8 or control characters.
    """
    text = "".join(itertools.takewhile(_is_readable, text.strip()))
    limit = min(_MAX_CHARACTERS, len(text) // 2)
    if limit < _MIN_CHARACTERS:
        return None
    line = text.partition("\n")[0].rstrip()
    if _MIN_CHARACTERS <= len(line) <= limit:
        return line
    words = re.match(rf"(?s).{{{_MIN_CHARACTERS},{limit}}}(?!\S)", text)
    return (words[0] if words else text[:limit]).rstrip()


def _is_readable(character: str) -> bool:
    return character in "\n\t" or (character.isprintable() and character != "\N{REPLACEMENT CHARACTER}")
