"""Validation: loss and bits per byte on rows that training never reads, and what gzip makes of the same text.

The rows are the same at every validation and on any number of ranks. Bits per byte compare models across vocabularies:
all bits that the model needs for the text, over the bytes of the text.
"""

import gzip
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.data.batches import read_sequences
from tinyllama.data.order import mixture_schedule
from tinyllama.data.store import TokenStore
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.distributed import World, all_reduce_sum


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


def validation_rows(recipe: Recipe, store: TokenStore) -> dict[str, Tensor]:
    """The rows to validate on, int64 [rows, sequence_length + 1] a source, shared out by the first mix.

    They lie evenly over each source's validation split, or are all of it; a source that has none is not there.
    """
    length = recipe.train.sequence_length
    weights = dict(zip(recipe.data.sources, mixture_schedule(recipe)[0].shares, strict=True))
    counts = {name: store.num_validation_sequences(name, length) for name, share in weights.items() if share}
    counts = {name: count for name, count in counts.items() if count}
    whole = sum(weights[name] for name in counts)
    shares = {name: float(weights[name] / whole) for name in counts}
    total = min([recipe.train.validation_sequences, *(counts[name] / shares[name] for name in counts)])
    rows = {}
    for name, count in counts.items():
        chosen = max(1, math.floor(total * shares[name] + 1e-9))
        split = store[f"{name}/validation"]
        rows[name] = read_sequences(split, [i * count // chosen for i in range(chosen)], length)
    return rows


def prepare_validation(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> Validation | None:
    """Read the validation rows and count the bytes of their targets; None where there are none."""
    by_source = validation_rows(recipe, store)
    if not by_source:
        return None
    rows = torch.cat(list(by_source.values()))
    return Validation(rows, len(target_bytes(rows, tokenizer)))


def target_bytes(rows: Tensor, tokenizer: Tokenizer) -> bytes:
    """The text of all targets in `rows` [rows, T + 1], markers left out."""
    pieces = tokenizer.piece_bytes()
    text = bytearray()
    for row in rows.tolist():
        for before, token in itertools.pairwise(row):
            piece = pieces[token]
            # The space that SentencePiece puts before a document is not the document's.
            text += piece[1:] if before in (tokenizer.bos_id, tokenizer.eos_id) and piece[:1] == b" " else piece
    return bytes(text)


def gzip_bits_per_byte(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> float:
    """What `gzip -9` needs for the validation documents: bits a byte, the sources in the rows' proportion.

    gzip gets each source's whole documents as one stream, so it loses nothing where a row is cut.
    """
    bits = size = 0.0
    for name, rows in validation_rows(recipe, store).items():
        split = store[f"{name}/validation"]
        whole = torch.from_numpy(split.read(0, split.num_tokens).astype("int64"))[None]
        text, share = target_bytes(whole, tokenizer), len(target_bytes(rows, tokenizer))
        bits += share * 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
        size += share
    return bits / size


@torch.no_grad()
def validate(
    model: Llama, validation: Validation, micro_batch: int, ranks: World, alive: Callable[[], None] = lambda: None
) -> Score:
    """Score the rows, each rank its share, every rank in as many forward passes; calls `alive` at each."""
    rows = validation.rows
    passes = -(-len(rows) // (micro_batch * ranks.count))
    nats = torch.zeros((), dtype=torch.float64)
    for number in range(passes):
        start = (number * ranks.count + ranks.rank) * micro_batch
        part = rows[start : start + micro_batch]
        filled = F.pad(part, (0, 0, 0, micro_batch - len(part))).to(ranks.device)  # whole batches: one compiled shape
        nats += model.loss(filled[:, :-1], part[:, 1:].to(ranks.device)).double().cpu()
        alive()
    total = all_reduce_sum(nats.to(ranks.device), ranks).item()
    tokens = rows[:, 1:].numel()
    return Score(total / tokens, total / math.log(2) / validation.num_bytes)
