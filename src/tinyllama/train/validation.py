"""Validation: loss and bits per byte on sequences that training never reads, and gzip's bits per byte on the same text.

The sequences are the same at every validation and on any number of ranks. Bits per byte are the bits that the model
needs per byte of text. This metric makes models with different vocabularies comparable.
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
from tinyllama.distributed import World, all_reduce_sum
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer


@dataclass(frozen=True)
class ValidationSet:
    """The validation sequences of a run."""

    sequences: Tensor
    """Inputs and, shifted by one, targets: int64 [sequences, sequence_length + 1]."""
    num_bytes: int
    """Size of the targets' text in bytes."""


@dataclass(frozen=True)
class ValidationScore:
    """The result of a validation."""

    loss: float
    """Mean loss in nats per token."""
    bits_per_byte: float


def read_validation_sequences(recipe: Recipe, store: TokenStore) -> dict[str, Tensor]:
    """Return the validation sequences of each source, int64 [sequences, sequence_length + 1].

    Each source contributes sequences in proportion to its weight in the first mixture. The sequences are spread evenly
    over the source's validation split. Sources without a validation split are not in the result.
    """
    length = recipe.train.sequence_length
    weights = dict(zip(recipe.data.sources, mixture_schedule(recipe)[0].shares, strict=True))
    available = {name: store.num_validation_sequences(name, length) for name, weight in weights.items() if weight}
    available = {name: count for name, count in available.items() if count}
    total_weight = sum(weights[name] for name in available)
    shares = {name: float(weights[name] / total_weight) for name in available}
    total = min([recipe.train.validation_sequences, *(available[name] / shares[name] for name in available)])
    sequences = {}
    for name, count in available.items():
        num_sequences = max(1, math.floor(total * shares[name] + 1e-9))
        indices = [i * count // num_sequences for i in range(num_sequences)]
        sequences[name] = read_sequences(store[f"{name}/validation"], indices, length)
    return sequences


def load_validation_set(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> ValidationSet | None:
    """Return the validation sequences, or None if the store contains none."""
    by_source = read_validation_sequences(recipe, store)
    if not by_source:
        return None
    sequences = torch.cat(list(by_source.values()))
    return ValidationSet(sequences, len(target_bytes(sequences, tokenizer)))


def target_bytes(sequences: Tensor, tokenizer: Tokenizer) -> bytes:
    """Return the text of all targets in `sequences` [sequences, T + 1], without BOS and EOS."""
    bytes_of_tokens = tokenizer.token_bytes()
    text = bytearray()
    for ids in sequences.tolist():
        for previous, token in itertools.pairwise(ids):
            token_bytes = bytes_of_tokens[token]
            # The space that SentencePiece adds before each document is not part of the document.
            is_first = previous in (tokenizer.bos_id, tokenizer.eos_id)
            text += token_bytes.removeprefix(b" ") if is_first else token_bytes
    return bytes(text)


def gzip_bits_per_byte(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> float:
    """Return the bits per byte of `gzip -9` on the validation documents, weighted like the validation sequences.

    gzip compresses each source's documents as one stream, so that the ends of sequences do not reduce the compression
    ratio.
    """
    bits = size = 0.0
    for name, sequences in read_validation_sequences(recipe, store).items():
        split = store[f"{name}/validation"]
        all_tokens = torch.from_numpy(split.read(0, split.num_tokens).astype("int64"))[None]
        text, num_bytes = target_bytes(all_tokens, tokenizer), len(target_bytes(sequences, tokenizer))
        bits += num_bytes * 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
        size += num_bytes
    return bits / size


@torch.no_grad()
def validate(
    model: Llama,
    validation_set: ValidationSet,
    micro_batch_size: int,
    world: World,
    heartbeat: Callable[[], None] = lambda: None,
) -> ValidationScore:
    """Score the validation set, split among the ranks; call `heartbeat` after each forward pass.

    All ranks run the same number of forward passes, because sharded models require this.
    """
    sequences = validation_set.sequences
    passes = -(-len(sequences) // (micro_batch_size * world.size))
    nats = torch.zeros((), dtype=torch.float64)
    for number in range(passes):
        start = (number * world.size + world.rank) * micro_batch_size
        part = sequences[start : start + micro_batch_size]
        # With padding, all forward passes have the same shape, so the model is compiled once.
        padded = F.pad(part, (0, 0, 0, micro_batch_size - len(part))).to(world.device)
        nats += model.loss(padded[:, :-1], part[:, 1:].to(world.device)).double().cpu()
        heartbeat()
    total = all_reduce_sum(nats.to(world.device), world).item()
    num_tokens = sequences[:, 1:].numel()
    return ValidationScore(total / num_tokens, total / math.log(2) / validation_set.num_bytes)
