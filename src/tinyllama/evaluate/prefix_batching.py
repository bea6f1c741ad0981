"""Groups requests that share a prefix, and packs groups of similar length into batches.

Requests with a common beginning, such as a question with its choices, become one prefix and one suffix per request.
For HellaSwag, whose items have four endings, shared prefixes halve the number of tokens. The batches depend only on the
requests. Ranks that divide the batches therefore compute the same results as one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama.errors import InputError

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""

BATCH_REQUESTS = 64
"""Maximum number of requests per batch; 64 requests have some thousand tokens, enough for fast matrix products."""
_BATCH_TOKENS = 16_384
"""Maximum number of tokens per batch. The activations of 16,384 tokens take 0.7 GB in the 1.1B model in float32."""
_MIN_SHARED_FRACTION = 0.25
"""Smallest fraction of a request's tokens that must be saved for the request to join a group. Below this fraction, the
longer attention rows cost more time than the saved tokens."""


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
        """Number of tokens that the model computes: the prefix once, and each suffix."""
        return self.prefix_length + sum(len(request.inputs) - self.prefix_length for request in self.requests)

    @property
    def longest(self) -> int:
        """Length of the longest request in tokens."""
        return max(len(request.inputs) for request in self.requests)


def to_requests(pairs: Sequence[Pair], context_length: int) -> list[Request]:
    """Return the request of each pair, truncated on the left to the context length, as in lm-eval's `hf`.

    Raises InputError if a continuation alone is longer than `context_length`.
    """
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > context_length:
        raise InputError(
            f"a continuation has {longest} tokens, the model's context holds {context_length}; skip the task with it"
        )
    return [
        Request(number, (context + continuation)[-(context_length + 1) : -1], continuation)
        for number, (context, continuation) in enumerate(pairs)
    ]


def form_batches(requests: Sequence[Request], batch_size: int) -> list[list[PrefixGroup]]:
    """Return all requests in batches of at most `batch_size` requests, longest requests first.

    The requests of a batch have similar lengths. If the memory is too small, the first batch already fails.
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
    """Return the new prefix length of `group` if `request` joins the group, or 0 if this saves too few tokens."""
    prefix = group.requests[0].inputs[: group.prefix_length]
    pairs = enumerate(zip(prefix, request.inputs, strict=False))
    shared = next((index for index, (a, b) in pairs if a != b), min(len(prefix), len(request.inputs)))
    saved = shared - (len(group.requests) - 1) * (group.prefix_length - shared)
    return shared if saved >= _MIN_SHARED_FRACTION * len(request.inputs) else 0
