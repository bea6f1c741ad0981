"""Strategies, settings and checks that the fuzz tests share: mutated bytes and JSON documents, and one-line errors.

The tests try the same examples each time; `make fuzz` searches for new ones.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tinyllama.errors import InputError


def fixed_examples(count: int) -> settings:
    """Return settings of a test that tries `count` examples, always the same ones."""
    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(slow)
    )


def assert_one_line(error: InputError) -> None:
    """Check that a message is one line of bounded length that a terminal can show."""
    text = str(error)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000, text
    text.encode()


_folders: list[tempfile.TemporaryDirectory[str]] = []


def shared_folder() -> Path:
    """Return a new folder that is removed when the process ends, for files that many examples use."""
    _folders.append(tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-"))
    return Path(_folders[-1].name)


Mutation = tuple[str, int, bytes]
"""An operation, its position (modulo the length) and its bytes."""

mutations: st.SearchStrategy[list[Mutation]] = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "replace", "truncate", "delete", "repeat"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from(
            [b"\0", b"\n", b"\r\n", b'"', b"{", b"[" * 200, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"]
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, edits: Sequence[Mutation]) -> bytes:
    """Apply mutations in order."""
    for operation, position, other in edits:
        place = position % (len(data) + 1)
        head, tail = data[:place], data[place:]
        match operation:
            case "flip":
                data = head + bytes([tail[0] ^ (other[0] or 1)]) + tail[1:] if tail else data
            case "insert":
                data = head + other + tail
            case "replace":
                data = head + other + tail[len(other) :]
            case "truncate":
                data = head
            case "delete":
                data = head + tail[len(other) :]
            case "repeat":
                data = head + tail[: 8 * len(other)] + tail
    return data


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**9, 2**63, -(10**19), 10**30, 1e308, -0.0, 0.5, float("nan"), float("inf")])
    | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "../x", "/", "\0", "3T", "null", "llama", "<s>", "</s>", "\ud800", "a" * 300])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated_documents(draw: st.DrawFn, valid: Any, max_edits: int = 3) -> Any:
    """Draw a JSON document with up to `max_edits` values replaced, deleted or renamed."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, max_edits))):
        places = list(_places(document))
        if not places:
            return draw(values)
        container, key = draw(st.sampled_from(places))
        operation = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        if operation == "replace":
            container[key] = draw(values)
        else:
            value = container.pop(key)
            if operation == "rename" and isinstance(container, dict):
                container[draw(st.text(max_size=6))] = value
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and key of every value in a document."""
    keys: Any = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys)[:200]:
        yield document, key
        yield from _places(document[key])
