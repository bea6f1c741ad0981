"""Which requests are computed together: those that begin alike in a group, groups of about one length in a batch.

Requests whose tokens begin alike, such as one question with its choices, become a trunk and a branch for what each
adds: HellaSwag's four endings so need half of the tokens that they have one by one. All of it depends on the requests
alone, so that ranks may share the batches out and still compute what one would.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama.errors import InputError

Pair = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""

BATCH_REQUESTS = 64
"""Requests of a batch: some thousand tokens, which keep a processor's matrix products busy."""
_BATCH_TOKENS = 16_384
"""A batch of long requests ends here: 0.7 GB of activations for the 1.1B model in float32."""
_MIN_SHARED_FRACTION = 0.25
"""Requests go together from this shared part on: fewer tokens would not pay for the longer rows of attention."""


@dataclass(frozen=True)
class Request:
    """What the model reads for a pair, and the ids that its last positions shall predict."""

    number: int
    """Of its pair."""
    inputs: list[int]
    targets: list[int]


@dataclass
class PrefixGroup:
    """Requests that begin alike."""

    requests: list[Request]
    trunk: int
    """Tokens that all of them begin with."""

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return self.trunk + sum(len(request.inputs) - self.trunk for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(len(request.inputs) for request in self.requests)


def to_requests(pairs: Sequence[Pair], context: int) -> list[Request]:
    """What the model reads for each pair; what is longer than its context loses its beginning, as in lm-eval's `hf`.

    Raises InputError where a continuation alone is longer.
    """
    longest = max((len(after) for _, after in pairs), default=0)
    if longest > context:
        raise InputError(
            f"a continuation has {longest} tokens; the model's context holds {context}; skip the task that has it"
        )
    return [
        Request(number, (before + after)[-(context + 1) : -1], after) for number, (before, after) in enumerate(pairs)
    ]


def form_batches(requests: Sequence[Request], batch_size: int) -> list[list[PrefixGroup]]:
    """All requests in batches of at most `batch_size`, the longest first.

    A batch is so of about one length, and what does not fit in memory fails at once.
    """
    groups = sorted(_groups(requests, batch_size), key=lambda group: (-group.longest, -group.trunk))
    batches: list[list[PrefixGroup]] = []
    room, tokens = 0, 0
    for group in groups:
        if len(group.requests) > room or group.tokens > tokens:
            batches.append([])
            room, tokens = batch_size, _BATCH_TOKENS
        batches[-1].append(group)
        room, tokens = room - len(group.requests), tokens - group.tokens
    return batches


def _groups(requests: Sequence[Request], limit: int) -> list[PrefixGroup]:
    """Neighbours in the order of their tokens that share enough, at most `limit` of them."""
    groups: list[PrefixGroup] = []
    for request in sorted(requests, key=lambda request: request.inputs):
        shared = _shared(groups[-1], request) if groups and len(groups[-1].requests) < limit else 0
        if shared:
            groups[-1].requests.append(request)
            groups[-1].trunk = shared
        else:
            groups.append(PrefixGroup([request], len(request.inputs)))
    return groups


def _shared(group: PrefixGroup, request: Request) -> int:
    """Tokens of the trunk if the request joins the group; 0 where that does not pay."""
    trunk = group.requests[0].inputs[: group.trunk]
    pairs = enumerate(zip(trunk, request.inputs, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(trunk), len(request.inputs)))
    saved = shared - (len(group.requests) - 1) * (group.trunk - shared)
    return shared if saved >= _MIN_SHARED_FRACTION * len(request.inputs) else 0
