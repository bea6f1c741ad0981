"""Strategies, settings and checks of the fuzz tests: edited bytes and JSON documents, and one-line errors.

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
    """Assert that a message is one line of bounded length that a terminal can show."""
    text = str(error)
    assert text.strip()
    assert len(text.splitlines()) == 1, text
    assert len(text) < 2000, text
    text.encode()


_folders: list[tempfile.TemporaryDirectory[str]] = []


def shared_folder() -> Path:
    """Return a new folder for files that many examples use; the folder is removed when the process ends."""
    _folders.append(tempfile.TemporaryDirectory(prefix="tinyllama-fuzz-"))
    return Path(_folders[-1].name)


Edit = tuple[int, int, bytes]
"""A position (modulo the length), a number of bytes to delete there, and bytes to insert."""

edits_of_bytes: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.integers(0, 1 << 20),
        st.integers(0, 8) | st.just(1 << 30),
        st.binary(max_size=8)
        | st.sampled_from([b"\0", b"\r\n", b'"', b"{", b"[" * 200, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"]),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the bytes after the edits, in order."""
    for position, num_deleted, inserted in edits:
        start = position % (len(data) + 1)
        data = data[:start] + inserted + data[start + num_deleted :]
    return data


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**9, 2**63, -(10**19), 10**30, 1e308, -0.0, 0.5, float("nan"), float("inf")])
    | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "../x", "/", "\0", "3T", "null", "llama", "<s>", "</s>", "\ud800", "a" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def edited_documents(draw: st.DrawFn, valid: Any) -> Any:
    """Draw a JSON document with one to three values replaced, deleted or renamed, or any other document."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places or draw(st.integers(0, 9)) == 9:
            return draw(values)
        container, key = draw(st.sampled_from(places))
        operation = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        value = draw(values) if operation == "replace" else container.pop(key)
        if operation == "replace":
            container[key] = value
        elif operation == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=6))] = value
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and key of every value in a document."""
    keys: Any = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys)[:200]:
        yield document, key
        yield from _places(document[key])
