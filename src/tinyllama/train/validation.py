"""Validation: loss and bits per byte on sequences that training never reads, and gzip's bits per byte on the same text.

The sequences are the same at every validation and on any number of ranks. Bits per byte are the bits that the model
needs per byte of text. This metric makes models with different vocabularies comparable.
"""

import gzip
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.data.batches import read_document_starts, read_sequences
from tinyllama.data.order import num_validation_sequences
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
    sources: Mapping[str, tuple[int, int]]
    """By source, in the order of `sequences`: number of sequences, and size of their targets' text in bytes."""
    document_starts: Tensor | None = None
    """The document mask, as in `Batch`; None without a mask."""


@dataclass(frozen=True)
class ValidationScore:
    """The result of a validation, of all sources or of one."""

    loss: float
    """Mean loss in nats per token."""
    bits_per_byte: float
    sources: Mapping[str, "ValidationScore"] = field(default_factory=dict)
    """Score of each source; empty in the score of one source."""

    def metrics(self) -> dict[str, float]:
        """Return the columns of metrics.jsonl: `validation_loss`, `validation_loss/SOURCE` and the bits per byte."""
        scores = {"": self, **{f"/{name}": score for name, score in self.sources.items()}}
        losses = {f"validation_loss{name}": score.loss for name, score in scores.items()}
        return losses | {f"validation_bits_per_byte{name}": score.bits_per_byte for name, score in scores.items()}


def read_validation_sequences(recipe: Recipe, store: TokenStore) -> dict[str, Tensor]:
    """Return the validation sequences of each source, int64 [sequences, sequence_length + 1]."""
    length = recipe.train.sequence_length
    return {
        name: read_sequences(store[f"{name}/validation"], indices, length)
        for name, indices in _validation_indices(recipe, store).items()
    }


def _validation_indices(recipe: Recipe, store: TokenStore) -> dict[str, list[int]]:
    """Return the indices of each source's validation sequences, which are spread evenly over its validation split.

    `num_validation_sequences` computes how many sequences each source contributes.
    """
    length = recipe.train.sequence_length
    available = {name: store.num_validation_sequences(name, length) for name in recipe.data.sources}
    return {
        name: [i * available[name] // num_sequences for i in range(num_sequences)]
        for name, num_sequences in num_validation_sequences(recipe, available).items()
    }


def load_validation_set(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> ValidationSet | None:
    """Return the validation sequences, or None if the store contains none."""
    by_source = read_validation_sequences(recipe, store)
    if not by_source:
        return None
    sizes = {name: (len(own), len(target_bytes(own, tokenizer))) for name, own in by_source.items()}
    starts = None
    if recipe.train.document_mask:
        by_index = _validation_indices(recipe, store).items()
        order = [(store[f"{name}/validation"], index) for name, indices in by_index for index in indices]
        starts = read_document_starts(order, recipe.train.sequence_length)
    return ValidationSet(torch.cat(list(by_source.values())), sizes, starts)


def target_bytes(sequences: Tensor, tokenizer: Tokenizer) -> bytes:
    """Return the text of all targets in `sequences` [sequences, T + 1], without BOS and EOS."""
    bytes_of_tokens, prefix = tokenizer.token_bytes(), b" " if tokenizer.adds_space else b""
    text = bytearray()
    for ids in sequences.tolist():
        for previous, token in itertools.pairwise(ids):
            token_bytes = bytes_of_tokens[token]
            # The space that a Llama 2-style tokenizer adds before each document is not part of the document.
            is_first = previous in (tokenizer.bos_id, tokenizer.eos_id)
            text += token_bytes.removeprefix(prefix) if is_first else token_bytes
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

    All ranks run the same number of forward passes, because sharded models require this. A forward pass may contain
    sequences of several sources.
    """
    sequences, device = validation_set.sequences, world.device
    length = sequences.shape[1] - 1
    passes = -(-len(sequences) // (micro_batch_size * world.size))
    nats = torch.zeros((), dtype=torch.float64)
    sequence_nats = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    for number in range(passes):
        start = (number * world.size + world.rank) * micro_batch_size
        part = sequences[start : start + micro_batch_size]
        # With padding, all forward passes have the same shape, so the model is compiled once.
        padding = (0, 0, 0, micro_batch_size - len(part))
        padded, starts = F.pad(part, padding).to(device), validation_set.document_starts
        if starts is not None:
            starts = F.pad(starts[start : start + micro_batch_size], padding).to(device)
        targets = padded[: len(part), 1:]
        token_nats = torch.empty(targets.numel(), device=device)
        loss = model.loss(padded[:, :-1], targets, token_nats=token_nats, document_starts=starts)
        nats += loss.double().cpu()
        sequence_nats[start : start + len(part)] = token_nats.view(targets.shape).sum(1, dtype=torch.float64)
        heartbeat()
    total = all_reduce_sum(nats.to(device), world).item()
    counts, sizes = zip(*validation_set.sources.values(), strict=True)
    parts = all_reduce_sum(sequence_nats, world).cpu().split(counts)
    sources = {
        name: ValidationScore(part.mean().item() / length, part.sum().item() / math.log(2) / num_bytes)
        for name, part, num_bytes in zip(validation_set.sources, parts, sizes, strict=True)
        if num_bytes  # a sequence may consist of BOS and EOS
    }
    return ValidationScore(total / (len(sequences) * length), total / math.log(2) / sum(sizes), sources)
