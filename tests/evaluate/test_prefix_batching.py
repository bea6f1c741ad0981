"""Every request is computed once, in batches that do not depend on who computes them."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllama.errors import InputError
from tinyllama.evaluate.prefix_batching import Pair, PrefixGroup, form_batches, to_requests

CONTEXT = 12
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def batches_of(pairs: Sequence[Pair], batch_size: int) -> list[list[PrefixGroup]]:
    return form_batches(to_requests(pairs, CONTEXT), batch_size)


@given(st.lists(st.tuples(IDS, IDS), max_size=30), st.integers(1, 9))
def test_every_request_stands_once_behind_the_trunk_of_its_group(pairs: list[Pair], batch_size: int) -> None:
    batches = batches_of(pairs, batch_size)
    requests = [request for batch in batches for group in batch for request in group.requests]
    assert sorted(request.number for request in requests) == list(range(len(pairs)))
    for request in requests:
        before, after = pairs[request.number]
        assert [*request.inputs, after[-1]] == (before + after)[-CONTEXT - 1 :]
        assert request.targets == after
    for batch in batches:
        assert 1 <= sum(len(group.requests) for group in batch) <= batch_size
        for group in batch:
            trunk = group.requests[0].inputs[: group.trunk]
            assert len(trunk) == group.trunk > 0
            assert all(request.inputs[: group.trunk] == trunk for request in group.requests)
    lengths = [group.longest for batch in batches for group in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_endings_share_their_context_and_choices_within_a_sentence_what_stands_before() -> None:
    endings = [([1, 2, 3, 4], [5, number]) for number in (6, 7, 8)]
    choices = [([2, 3, 4, 9], [6, 6]), ([2, 3, 4, 8], [6, 6])]
    groups = [group for batch in batches_of([*endings, *choices], 8) for group in batch]
    assert [(len(group.requests), group.trunk, group.tokens) for group in groups] == [(3, 5, 5), (2, 3, 7)]


def test_a_few_equal_ids_in_front_do_not_join_what_else_differs() -> None:
    pairs = [([1, *range(first, first + 7)], [0]) for first in (10, 20, 30)]
    assert [group.trunk for batch in batches_of(pairs, 8) for group in batch] == [8, 8, 8]


def test_a_continuation_longer_than_the_context_is_named() -> None:
    with pytest.raises(InputError, match="a continuation has 13 tokens; the model's context holds 12"):
        to_requests([([1], [5] * 13)], CONTEXT)
