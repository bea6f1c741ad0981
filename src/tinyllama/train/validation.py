"""Validation: loss and bits per byte on sequences that training never reads, and gzip's bits per byte on the same text.

The sequences are the same at every validation and on any number of ranks. Bits per byte are the bits that the model
needs per byte of text. This metric makes models with different vocabularies comparable. The score of each source and of
each range of positions shows which text, and which length of context, the model predicts well.
"""

import gzip
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.data.batches import read_sequences
from tinyllama.data.order import num_validation_sequences
from tinyllama.data.store import TokenStore
from tinyllama.distributed import World, all_reduce_sum
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer

_FIRST_RANGE = 256
"""Length of the first range of positions in tokens."""


@dataclass(frozen=True)
class ValidationSet:
    """The validation sequences of a run."""

    sequences: Tensor
    """Inputs and, shifted by one, targets: int64 [sequences, sequence_length + 1]."""
    sources: Mapping[str, tuple[int, int]]
    """By source, in the order of `sequences`: number of sequences, and size of their targets' text in bytes."""
    positions: Mapping[str, tuple[slice, int]]
    """By name of a range of `position_ranges`: the range, and size of its targets' text in bytes."""


@dataclass(frozen=True)
class ValidationScore:
    """The result of a validation, of all targets, of one source or of one range of positions."""

    loss: float
    """Mean loss in nats per token."""
    bits_per_byte: float
    sources: Mapping[str, "ValidationScore"] = field(default_factory=dict)
    """Score of each source; empty in the score of a part."""
    positions: Mapping[str, "ValidationScore"] = field(default_factory=dict)
    """Score of each range of positions, if there are several; empty in the score of a part."""

    def metrics(self) -> dict[str, float]:
        """Return the columns of metrics.jsonl, which are `validation_loss`, `validation_bits_per_byte` and their parts.

        The names of the parts are `validation_loss/SOURCE` and `validation_loss_by_position/FIRST-LAST`. They cannot be
        equal, whatever the name of a source is.
        """
        scores = {"": self, **{f"/{name}": score for name, score in self.sources.items()}}
        scores |= {f"_by_position/{name}": score for name, score in self.positions.items()}
        losses = {f"validation_loss{name}": score.loss for name, score in scores.items()}
        return losses | {f"validation_bits_per_byte{name}": score.bits_per_byte for name, score in scores.items()}


def read_validation_sequences(recipe: Recipe, store: TokenStore) -> dict[str, Tensor]:
    """Return the validation sequences of each source, int64 [sequences, sequence_length + 1].

    `num_validation_sequences` computes how many sequences each source contributes. The sequences are spread evenly over
    the source's validation split.
    """
    length = recipe.train.sequence_length
    available = {name: store.num_validation_sequences(name, length) for name in recipe.data.sources}
    sequences = {}
    for name, num_sequences in num_validation_sequences(recipe, available).items():
        indices = [i * available[name] // num_sequences for i in range(num_sequences)]
        sequences[name] = read_sequences(store[f"{name}/validation"], indices, length)
    return sequences


def position_ranges(length: int) -> dict[str, slice]:
    """Return ranges of positions that cover a sequence of `length` tokens, by name: `0-255`, `256-511`, `512-1023`.

    Each range after the first is as long as all ranges before it, except that the last one ends at `length`. The ranges
    of different lengths therefore have the same beginnings.
    """
    edges = [0]
    while (edge := max(_FIRST_RANGE, 2 * edges[-1])) <= length / 2:
        edges.append(edge)
    return {f"{start}-{stop - 1}": slice(start, stop) for start, stop in itertools.pairwise([*edges, length])}


def load_validation_set(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> ValidationSet | None:
    """Return the validation sequences, or None if the store contains none."""
    by_source = read_validation_sequences(recipe, store)
    if not by_source:
        return None
    ranges = position_ranges(recipe.train.sequence_length)
    sizes = {
        name: [len(target_bytes(own[:, part.start : part.stop + 1], tokenizer)) for part in ranges.values()]
        for name, own in by_source.items()
    }
    sources = {name: (len(own), sum(sizes[name])) for name, own in by_source.items()}
    by_range = map(sum, zip(*sizes.values(), strict=True))
    positions = {name: (part, size) for (name, part), size in zip(ranges.items(), by_range, strict=True)}
    return ValidationSet(torch.cat(list(by_source.values())), sources, positions)


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

    All ranks run the same number of forward passes, because sharded models require this. A forward pass may contain
    sequences of several sources.
    """
    sequences, device = validation_set.sequences, world.device
    ranges = [part for part, _ in validation_set.positions.values()]
    length = sequences.shape[1] - 1
    passes = -(-len(sequences) // (micro_batch_size * world.size))
    nats = torch.zeros((), dtype=torch.float64)
    range_nats = torch.zeros(len(sequences), len(ranges), dtype=torch.float64, device=device)
    for number in range(passes):
        start = (number * world.size + world.rank) * micro_batch_size
        part = sequences[start : start + micro_batch_size]
        # With padding, all forward passes have the same shape, so the model is compiled once.
        padded = F.pad(part, (0, 0, 0, micro_batch_size - len(part))).to(device)
        targets = padded[: len(part), 1:]
        token_nats = torch.empty(targets.numel(), device=device)
        nats += model.loss(padded[:, :-1], targets, token_nats=token_nats).double().cpu()
        by_range = [token_nats.view(targets.shape)[:, own].sum(1, dtype=torch.float64) for own in ranges]
        range_nats[start : start + len(part)] = torch.stack(by_range, 1)
        heartbeat()
    total = all_reduce_sum(nats.to(device), world).item()
    range_nats = all_reduce_sum(range_nats, world).cpu()
    counts = [count for count, _ in validation_set.sources.values()]
    by_source = (own.sum().item() for own in range_nats.split(counts))
    sources = {
        name: _score(own, count * length, num_bytes)
        for own, (name, (count, num_bytes)) in zip(by_source, validation_set.sources.items(), strict=True)
        if num_bytes  # a sequence may consist of BOS and EOS
    }
    positions = {
        name: _score(own, len(sequences) * (part.stop - part.start), num_bytes)
        for own, (name, (part, num_bytes)) in zip(
            range_nats.sum(0).tolist(), validation_set.positions.items(), strict=True
        )
        if num_bytes and len(ranges) > 1
    }
    num_bytes = sum(num_bytes for _, num_bytes in validation_set.sources.values())
    return replace(_score(total, len(sequences) * length, num_bytes), sources=sources, positions=positions)


def _score(nats: float, num_tokens: int, num_bytes: int) -> ValidationScore:
    return ValidationScore(nats / num_tokens, nats / math.log(2) / num_bytes)
