"""What is done to something whole: bytes changed, cut, doubled; values of a JSON document replaced or taken out."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

Change = tuple[str, int, bytes]
"""What is done, where (modulo the length), and the bytes it is done with."""

changes: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "replace", "cut", "drop", "double"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from(
            [b"\0", b"\n", b"\r\n", b'"', b"{", b"[" * 200, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"]
        ),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, todo: Sequence[Change]) -> bytes:
    """Bytes after some changes, one after the other."""
    for what, where, with_bytes in todo:
        place = where % (len(data) + 1)
        data = _changed_once(data, what, place, with_bytes)
    return data


def _changed_once(data: bytes, what: str, place: int, other: bytes) -> bytes:
    head, tail = data[:place], data[place:]
    match what:
        case "flip":
            return head + bytes([tail[0] ^ (other[0] or 1)]) + tail[1:] if tail else data
        case "insert":
            return head + other + tail
        case "replace":
            return head + other + tail[len(other) :]
        case "cut":
            return head
        case "drop":
            return head + tail[len(other) :]
    return head + tail[: 8 * len(other)] + tail


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
def documents(draw: st.DrawFn, whole: Any, most: int = 3) -> Any:
    """A JSON document in which up to `most` values are replaced, taken out or given other names."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(document))
        if not places:
            return draw(values)
        inner, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        if what == "replace":
            inner[key] = draw(values)
        else:
            taken = inner.pop(key)
            if what == "rename" and isinstance(inner, dict):
                inner[draw(st.text(max_size=6))] = taken
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document that holds a value."""
    keys: Any = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys)[:200]:
        yield document, key
        yield from _places(document[key])
