"""Log-likelihoods of continuations; the model processes a prefix that several requests share only once.

Requests with a common beginning, such as a question with its choices, become one prefix and one suffix per request.
For HellaSwag, whose items have four endings, shared prefixes halve the number of tokens. The batches depend only on the
requests, so ranks that divide the batches compute the same results as one process.

The tokens of a batch are packed without padding. Only attention, a small part of the work, treats prefixes and suffixes
separately. Logits are computed only at positions that predict a continuation, for at most 1024 positions at a time. The
logits of 1024 positions take 131 MB for a vocabulary of 32,000.

Shapes: N tokens of a batch, G groups (prefixes), S suffixes, T time, H query heads, K key/value heads, E head size,
D model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from tinyllama.model.attention import INFERENCE_KERNELS, causal_attention
from tinyllama.model.llama import Llama
from tinyllama.model.rope import rope_table

LogLikelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether it is the model's greedy choice."""
Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""

BATCH_REQUESTS = 64
"""Maximum number of requests per batch. 64 requests have a few thousand tokens, enough for fast matrix products."""
_BATCH_TOKENS = 16_384
"""Maximum number of tokens per batch. The activations of 16,384 tokens take 0.7 GB in the 1.1B model in float32."""
_MIN_SHARED_FRACTION = 0.25
"""Minimum fraction of a request's tokens that a shared prefix must save. Below this fraction, the longer rows of
attention cost more time than the shared prefix saves."""
_LOGITS_POSITIONS = 1024
"""Maximum number of positions whose logits are in memory at the same time."""


@dataclass(frozen=True)
class Request:
    """Model input for one pair, and the target ids, which the last positions of the input predict."""

    number: int
    """Index of the pair."""
    inputs: list[int]
    targets: list[int]


@dataclass
class PrefixGroup:
    """Requests with a common prefix."""

    requests: list[Request]
    prefix_length: int
    """Length of the common prefix in tokens."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model processes: the prefix once, and each suffix."""
        return self.prefix_length + sum(len(request.inputs) - self.prefix_length for request in self.requests)

    @property
    def longest(self) -> int:
        """Length of the longest request in tokens."""
        return max(len(request.inputs) for request in self.requests)


def to_requests(pairs: Sequence[Pair], context_length: int) -> list[Request]:
    """Return a request for each pair, truncated on the left to the context length, as in lm-eval's `hf`."""
    return [
        Request(number, (context + continuation)[-(context_length + 1) : -1], continuation)
        for number, (context, continuation) in enumerate(pairs)
    ]


def form_batches(requests: Sequence[Request], batch_size: int) -> list[list[PrefixGroup]]:
    """Return all requests in batches of at most `batch_size` requests, longest requests first.

    Requests of similar length share a batch. The longest come first, so the first batch fails if the memory is
    insufficient.
    """
    groups = sorted(_group_by_prefix(requests, batch_size), key=lambda group: (-group.longest, -group.prefix_length))
    batches: list[list[PrefixGroup]] = []
    free_requests, free_tokens = 0, 0
    for group in groups:
        if len(group.requests) > free_requests or group.num_tokens > free_tokens:
            batches.append([])
            free_requests, free_tokens = batch_size, _BATCH_TOKENS
        batches[-1].append(group)
        free_requests, free_tokens = free_requests - len(group.requests), free_tokens - group.num_tokens
    return batches


def _group_by_prefix(requests: Sequence[Request], max_requests: int) -> list[PrefixGroup]:
    """Sort requests by their token ids, and group adjacent requests that share enough tokens."""
    groups: list[PrefixGroup] = []
    for request in sorted(requests, key=lambda request: request.inputs):
        shared = _shared_length(groups[-1], request) if groups and len(groups[-1].requests) < max_requests else 0
        if shared:
            groups[-1].requests.append(request)
            groups[-1].prefix_length = shared
        else:
            groups.append(PrefixGroup([request], len(request.inputs)))
    return groups


def _shared_length(group: PrefixGroup, request: Request) -> int:
    """Return the prefix length of `group` after adding `request`, or 0 if sharing would save too few tokens."""
    prefix = group.requests[0].inputs[: group.prefix_length]
    pairs = enumerate(zip(prefix, request.inputs, strict=False))
    shared = next((index for index, (a, b) in pairs if a != b), min(len(prefix), len(request.inputs)))
    saved = shared - (len(group.requests) - 1) * (group.prefix_length - shared)
    return shared if saved >= _MIN_SHARED_FRACTION * len(request.inputs) else 0


@torch.inference_mode()
@sdpa_kernel(INFERENCE_KERNELS)
def score_batch(model: Llama, groups: Sequence[PrefixGroup]) -> dict[int, LogLikelihood]:
    """Return the log-likelihood of each request in a batch, by request number."""
    batch = pack(groups, model.device)
    length = int(batch.positions.max()) + 1
    rope = rope_table(model.config, length, device=batch.ids.device)[:, batch.positions]
    hidden = model.embedding(batch.ids).to(model.precision)
    for block in model.blocks:
        hidden = block(hidden, rope, batch)
    hidden = model.norm(hidden)
    positions, index = torch.unique(batch.predicting, return_inverse=True)
    likelihoods, greedy = _score_targets(model, hidden[0, positions], index, batch.targets)
    requests = [request for group in groups for request in group.requests]
    lengths = [len(request.targets) for request in requests]
    per_request = zip(requests, likelihoods.split(lengths), greedy.split(lengths), strict=True)
    return {request.number: (float(values.sum()), bool(same.all())) for request, values, same in per_request}


def _score_targets(model: Llama, hidden: Tensor, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score each target from the hidden state that predicts it, `hidden[index]`.

    Shapes, for P positions and M targets: hidden[P, D], index int64[M], targets int64[M]. Return two tensors on the
    CPU: the log-likelihoods, float64[M], and whether each target is the most likely token, bool[M].
    """
    likelihoods = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(hidden), _LOGITS_POSITIONS):
        logits = model.logits(hidden[start : start + _LOGITS_POSITIONS]).float()
        selected = (index >= start) & (index < start + len(logits))
        rows, wanted = index[selected] - start, targets[selected]
        # float64 avoids rounding errors in the sum over a long continuation
        likelihoods[selected] = (logits[rows, wanted] - logits.logsumexp(-1)[rows]).double()
        greedy[selected] = logits.argmax(-1)[rows] == wanted
    return likelihoods.cpu(), greedy.cpu()


@dataclass
class PackedBatch:
    """Several groups, packed into one sequence of tokens.

    A token attends to itself and to the preceding tokens of its prefix and its suffix. All indices of tokens refer to
    the packed sequence.
    """

    ids: Tensor
    """int64[1, N]."""
    positions: Tensor
    """int64[N]: positions in the requests, for the rotary embedding."""
    predicting: Tensor
    """int64: index of the token that predicts each target, request by request."""
    targets: Tensor
    """int64: token ids to predict."""
    prefixes: Tensor
    """int64[G, T]: indices of the tokens of each prefix, padded with 0."""
    suffixes: Tensor
    """int64[S, T]: indices of the tokens of each suffix, padded with 0."""
    suffix_keys: Tensor
    """int64[S, prefix T + suffix T]: indices of the tokens whose keys a suffix may attend to."""
    mask: Tensor
    """bool[S, 1, suffix T, prefix T + suffix T]: which of `suffix_keys` each token of a suffix attends to."""
    unpadded: Tensor
    """int64[N]: index of each token in the flattened prefixes and suffixes."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the packed batch's attention [1, H, N, E] for query[1, H, N, E], keys and values[1, K, N, E]."""
        query, keys, values = (x[0].transpose(0, 1) for x in (query, keys, values))
        of_prefixes = (x[self.prefixes].transpose(1, 2) for x in (query, keys, values))
        mixed = [causal_attention(*of_prefixes).transpose(1, 2).flatten(0, 1)]
        if len(self.suffixes):
            of_suffixes = (query[self.suffixes], keys[self.suffix_keys], values[self.suffix_keys])
            q, k, v = (x.transpose(1, 2) for x in of_suffixes)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
            mixed.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)[self.unpadded].transpose(0, 1)[None]


def pack(groups: Sequence[PrefixGroup], device: torch.device) -> PackedBatch:
    """Pack groups into one sequence, in which each prefix is followed by the suffixes of its requests."""
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    prefixes: list[range] = []
    suffixes: list[range] = []
    owners: list[int] = []  # for each suffix, the index of its prefix

    def append(tokens: list[int], position: int) -> range:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        return range(start, len(ids))

    for group in groups:
        prefix = append(group.requests[0].inputs[: group.prefix_length], 0)
        prefixes.append(prefix)
        for request in group.requests:
            tokens = [*prefix]
            if len(request.inputs) > group.prefix_length:
                suffix = append(request.inputs[group.prefix_length :], group.prefix_length)
                suffixes.append(suffix)
                owners.append(len(prefixes) - 1)
                tokens += suffix
            predicting += tokens[len(tokens) - len(request.targets) :]
            targets += request.targets
    padded_prefixes, padded_suffixes = _pad(prefixes), _pad(suffixes)
    prefix_lengths = torch.tensor([len(prefix) for prefix in prefixes])[owners]
    suffix_time = padded_suffixes.shape[1]
    in_prefix = torch.arange(padded_prefixes.shape[1]) < prefix_lengths[:, None]
    causal = torch.ones(suffix_time, suffix_time, dtype=torch.bool).tril()
    mask = torch.cat((in_prefix[:, None].expand(-1, suffix_time, -1), causal.expand(len(suffixes), -1, -1)), dim=-1)
    flat = torch.cat((padded_prefixes.flatten(), padded_suffixes.flatten()))
    is_token = torch.cat((_is_token(prefixes).flatten(), _is_token(suffixes).flatten()))
    unpadded = torch.empty(len(ids), dtype=torch.long)
    unpadded[flat[is_token]] = torch.arange(len(flat))[is_token]
    tensors = {
        "ids": torch.tensor([ids]),
        "positions": torch.tensor(positions),
        "predicting": torch.tensor(predicting),
        "targets": torch.tensor(targets),
        "prefixes": padded_prefixes,
        "suffixes": padded_suffixes,
        "suffix_keys": torch.cat((padded_prefixes[owners], padded_suffixes), dim=1),
        "mask": mask[:, None],
        "unpadded": unpadded,
    }
    return PackedBatch(**{name: tensor.to(device) for name, tensor in tensors.items()})


def _pad(spans: Sequence[range]) -> Tensor:
    """Return the indices of each span, padded with 0, as int64[spans, longest]."""
    starts = torch.tensor([span.start for span in spans], dtype=torch.long)
    is_token = _is_token(spans)
    return (starts[:, None] + torch.arange(is_token.shape[1])).where(is_token, 0)


def _is_token(spans: Sequence[range]) -> Tensor:
    """Return a mask bool[spans, longest], which is False for padding."""
    lengths = torch.tensor([len(span) for span in spans], dtype=torch.long)
    return torch.arange(max(map(len, spans), default=0)) < lengths[:, None]
