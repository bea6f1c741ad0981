"""Batches of requests with shared prefixes."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tinyllama.evaluate.scoring import Pair, PrefixGroup, form_batches, to_requests

CONTEXT_LENGTH = 12
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def batches_of(pairs: Sequence[Pair], batch_size: int) -> list[list[PrefixGroup]]:
    return form_batches(to_requests(pairs, CONTEXT_LENGTH), batch_size)


@given(st.lists(st.tuples(IDS, IDS), max_size=30), st.integers(1, 9))
def test_every_request_is_in_one_group_and_starts_with_its_prefix(pairs: list[Pair], batch_size: int) -> None:
    batches = batches_of(pairs, batch_size)
    requests = [request for batch in batches for group in batch for request in group.requests]
    assert sorted(request.number for request in requests) == list(range(len(pairs)))
    for request in requests:
        context, continuation = pairs[request.number]
        assert [*request.inputs, continuation[-1]] == (context + continuation)[-CONTEXT_LENGTH - 1 :]
        assert request.targets == continuation
    for batch in batches:
        assert 1 <= sum(len(group.requests) for group in batch) <= batch_size
        for group in batch:
            prefix = group.requests[0].inputs[: group.prefix_length]
            assert len(prefix) == group.prefix_length > 0
            assert all(request.inputs[: group.prefix_length] == prefix for request in group.requests)
    lengths = [group.longest for batch in batches for group in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_endings_share_their_context_and_choices_within_a_sentence_their_beginning() -> None:
    endings = [([1, 2, 3, 4], [5, number]) for number in (6, 7, 8)]
    choices = [([2, 3, 4, 9], [6, 6]), ([2, 3, 4, 8], [6, 6])]
    groups = [group for batch in batches_of([*endings, *choices], 8) for group in batch]
    assert [(len(group.requests), group.prefix_length, group.num_tokens) for group in groups] == [(3, 5, 5), (2, 3, 7)]


def test_requests_that_share_few_tokens_are_not_grouped() -> None:
    pairs = [([1, *range(first, first + 7)], [0]) for first in (10, 20, 30)]
    assert [group.prefix_length for batch in batches_of(pairs, 8) for group in batch] == [8, 8, 8]
