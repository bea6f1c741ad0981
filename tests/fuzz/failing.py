"""A property test that reads raw files like the real ones and fails at its fiftieth example."""

from typing import Any

from hypothesis import given
from tests.fuzz.strategies import edited, edits_of_bytes, fixed_examples
from tests.fuzz.test_readers import check, valid_file

examples = iter(range(49))


@fixed_examples(100)
@given(edits=edits_of_bytes)
def test_fails_at_the_fiftieth_example(edits: Any) -> None:
    check("jsonl", ".jsonl", edited(valid_file("jsonl", ".jsonl"), edits))
    if next(examples, None) is None:
        raise RuntimeError("failure on purpose")
