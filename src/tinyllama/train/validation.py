"""Validation: loss and bits per byte on rows that training never reads, and what gzip makes of the same text.

The rows are the same at every validation and on any number of ranks. Bits per byte compare models across vocabularies:
all bits that the model needs for the text, over the bytes of the text.
"""

import gzip
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllama.data.batches import read_sequence, stack
from tinyllama.data.order import mixes
from tinyllama.data.store import TokenStore
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.parallel import Ranks, sum_over_ranks


@dataclass(frozen=True)
class Validation:
    """The rows that are scored: int64 [rows, sequence_length + 1], and the bytes of the text that they predict."""

    rows: Tensor
    num_bytes: int


@dataclass(frozen=True)
class Score:
    """A validation's outcome."""

    loss: float
    """Mean nats a token."""
    bits_per_byte: float


def validation_rows(recipe: Recipe, store: TokenStore) -> Tensor | None:
    """The rows to validate on, shared out by the first mix; None where a source of it has no validation sequence.

    They lie evenly over each source's validation split, or are all of it.
    """
    length = recipe.train.sequence_length
    names = [name for name, share in zip(recipe.data.sources, mixes(recipe)[0].shares, strict=True) if share]
    shares = [float(share) for share in mixes(recipe)[0].shares if share]
    splits = [store[f"{name}/validation"] for name in names if f"{name}/validation" in store]
    counts = [split.num_sequences(length) for split in splits]
    if len(splits) < len(names) or not all(counts):
        return None
    total = min(
        recipe.train.validation_sequences,
        *(count / share for count, share in zip(counts, shares, strict=True)),
    )
    rows = []
    for split, count, share in zip(splits, counts, shares, strict=True):
        chosen = max(1, math.floor(total * share + 1e-9))
        rows += [read_sequence(split, i * count // chosen, length) for i in range(chosen)]
    return stack(rows)


def prepare_validation(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> Validation | None:
    """Read the validation rows and count the bytes of their targets; None where there are none."""
    rows = validation_rows(recipe, store)
    return None if rows is None else Validation(rows, len(target_bytes(rows, tokenizer)))


def target_bytes(rows: Tensor, tokenizer: Tokenizer) -> bytes:
    """The text of all targets in `rows` [rows, T + 1], markers left out."""
    pieces = tokenizer.piece_bytes()
    text = bytearray()
    for row in rows.tolist():
        for before, token in itertools.pairwise(row):
            piece = pieces[token]
            # The space that SentencePiece puts before a document is not the document's.
            text += piece[1:] if before == tokenizer.bos_id and piece[:1] == b" " else piece
    return bytes(text)


def gzip_bits_per_byte(rows: Tensor, tokenizer: Tokenizer) -> float:
    """What `gzip -9` needs for the same text as one stream: bits a byte."""
    text = target_bytes(rows, tokenizer)
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


@torch.no_grad()
def validate(model: nn.Module, validation: Validation, micro_batch: int, ranks: Ranks) -> Score:
    """Score the rows, each rank its share, every rank in as many forward passes."""
    rows = validation.rows
    passes = -(-len(rows) // (micro_batch * ranks.count))
    nats = torch.zeros((), dtype=torch.float64)
    for number in range(passes):
        start = (number * ranks.count + ranks.rank) * micro_batch
        part = rows[start : start + micro_batch]
        filled = F.pad(part, (0, 0, 0, micro_batch - len(part))).to(ranks.device)  # whole batches: one compiled shape
        logits = model(filled[:, :-1])[: len(part)]
        targets = filled[: len(part), 1:]
        nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").double().cpu()
    total = sum_over_ranks(nats.to(ranks.device), ranks).item()
    tokens = rows[:, 1:].numel()
    return Score(total / tokens, total / math.log(2) / validation.num_bytes)
