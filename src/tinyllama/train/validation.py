"""Validation: loss and bits per byte on sequences that training never reads, and gzip's bits per byte on the same text.

The sequences are the same at every validation and on any number of ranks. Bits per byte are the bits that the model
needs per byte of text. This metric makes models with different vocabularies comparable. The score of each source and of
each range of positions shows which text, and which length of context, the model predicts well.
"""

import gzip
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

_FIRST_RANGE = 256
"""Length of the first range of positions in tokens."""


@dataclass(frozen=True)
class ValidationSet:
    """The validation sequences of a run, and the parts of them that have scores of their own: N sequences, R ranges."""

    sequences: Tensor
    """Inputs and, shifted by one, targets: int64 [N, T + 1]."""
    document_starts: Tensor | None
    """The document mask, as in `Batch`; None without a mask."""
    sources: Mapping[str, int]
    """Number of sequences by source, in the order of `sequences`."""
    positions: Sequence[str]
    """Names of the ranges of positions; see `position_ranges`."""
    ranges: Tensor
    """Number of the range that contains the position of a target: uint8 [N, T]."""
    num_targets: Tensor
    """Number of targets by sequence and range: int64 [N, R]."""
    num_bytes: Tensor
    """Size of the text of these targets: int64 [N, R]."""


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

        The names of the parts are, for example, `validation_loss/SOURCE` and `validation_loss_by_position/FIRST-LAST`.
        No name of a source makes two columns equal.
        """
        scores = {"": self, **{f"/{name}": score for name, score in self.sources.items()}}
        scores |= {f"_by_position/{name}": score for name, score in self.positions.items()}
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


def position_ranges(length: int) -> list[range]:
    """Return the ranges of positions that have scores of their own in sequences of `length` tokens.

    For 1,024 tokens, the ranges are 0-255, 256-511 and 512-1023. Each range after the first is at least as long as all
    ranges before it. Sequences below 512 tokens have one range.
    """
    edges = [0]
    while (edge := max(_FIRST_RANGE, 2 * edges[-1])) <= length / 2:
        edges.append(edge)
    return [range(start, stop) for start, stop in itertools.pairwise([*edges, length])]


def load_validation_set(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> ValidationSet | None:
    """Return the validation sequences, or None if the store contains none."""
    by_source, length = read_validation_sequences(recipe, store), recipe.train.sequence_length
    if not by_source:
        return None
    sequences, starts, ranges = torch.cat(list(by_source.values())), None, position_ranges(length)
    positions = torch.arange(length).repeat(len(sequences), 1)
    if recipe.train.document_mask:
        by_index = _validation_indices(recipe, store).items()
        order = [(store[f"{name}/validation"], index) for name, indices in by_index for index in indices]
        starts = read_document_starts(order, length)
        positions = positions - starts
    first_of_later = torch.tensor([part.start for part in ranges[1:]], dtype=torch.int64)
    range_numbers = torch.bucketize(positions, first_of_later, right=True).to(torch.uint8)
    sizes = torch.tensor([len(text) for text in _target_texts(sequences, tokenizer)]).view(positions.shape)
    return ValidationSet(
        sequences,
        starts,
        {name: len(own) for name, own in by_source.items()},
        [f"{part.start}-{part.stop - 1}" for part in ranges],
        range_numbers,
        _sum_by_range(torch.ones_like(sizes), range_numbers, len(ranges)),
        _sum_by_range(sizes, range_numbers, len(ranges)),
    )


def _sum_by_range(values: Tensor, ranges: Tensor, num_ranges: int) -> Tensor:
    """Return the sums of values [N, T] by sequence and range [N, R], in 64 bits."""
    dtype = torch.float64 if values.is_floating_point() else torch.int64
    sums = [torch.where(ranges == number, values, 0).sum(1, dtype=dtype) for number in range(num_ranges)]
    return torch.stack(sums, 1)


def target_bytes(sequences: Tensor, tokenizer: Tokenizer) -> bytes:
    """Return the text of all targets in `sequences` [sequences, T + 1], without BOS and EOS."""
    return b"".join(_target_texts(sequences, tokenizer))


def _target_texts(sequences: Tensor, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the text of each target; that of BOS and EOS is empty."""
    bytes_of_tokens, prefix = tokenizer.token_bytes(), b" " if tokenizer.adds_space else b""
    for ids in sequences.tolist():
        for previous, token in itertools.pairwise(ids):
            token_bytes = bytes_of_tokens[token]
            # The space that a Llama 2-style tokenizer adds before each document is not part of the document.
            is_first = previous in (tokenizer.bos_id, tokenizer.eos_id)
            yield token_bytes.removeprefix(prefix) if is_first else token_bytes


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
    passes = -(-len(sequences) // (micro_batch_size * world.size))
    nats = torch.zeros((), dtype=torch.float64)
    range_nats = torch.zeros(validation_set.num_targets.shape, dtype=torch.float64, device=device)
    for number in range(passes):
        start = (number * world.size + world.rank) * micro_batch_size
        own = slice(start, start + micro_batch_size)
        part, ranges = sequences[own], validation_set.ranges[own].to(device)
        # With padding, all forward passes have the same shape, so the model is compiled once.
        padding = (0, 0, 0, micro_batch_size - len(part))
        padded, starts = F.pad(part, padding).to(device), validation_set.document_starts
        if starts is not None:
            starts = F.pad(starts[own], padding).to(device)
        targets = padded[: len(part), 1:]
        token_nats = torch.empty(targets.numel(), device=device)
        loss = model.loss(padded[:, :-1], targets, token_nats=token_nats, document_starts=starts)
        nats += loss.double().cpu()
        range_nats[own] = _sum_by_range(token_nats.view(targets.shape), ranges, range_nats.shape[1])
        heartbeat()
    total = all_reduce_sum(nats.to(device), world).item()
    sums = (all_reduce_sum(range_nats, world).cpu(), validation_set.num_targets, validation_set.num_bytes)
    counts = list(validation_set.sources.values())
    sources = _scores(validation_set.sources, *([own.sum().item() for own in part.split(counts)] for part in sums))
    positions = _scores(validation_set.positions, *(part.sum(0).tolist() for part in sums))
    num_targets, num_bytes = (part.sum().item() for part in sums[1:])
    has_several = len(validation_set.positions) > 1
    return ValidationScore(
        total / num_targets, total / math.log(2) / num_bytes, sources, positions if has_several else {}
    )


def _scores(
    names: Iterable[str], nats: list[float], num_targets: list[float], num_bytes: list[float]
) -> dict[str, ValidationScore]:
    """Return the score of each part with text; a sequence may consist of BOS and EOS."""
    rows = zip(names, nats, num_targets, num_bytes, strict=True)
    return {name: ValidationScore(own / count, own / math.log(2) / size) for name, own, count, size in rows if size}
