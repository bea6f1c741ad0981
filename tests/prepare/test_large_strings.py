"""A document of many megabytes is read as the same text as any other, in little memory."""

import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllama import text as text_module
from tinyllama.prepare import json_lines
from tinyllama.prepare.json_lines import RepairedObject, parse_long_line
from tinyllama.text import is_utf8, iter_utf8_chunks, to_str

TEXTS = st.text(st.sampled_from('a"\\\n/uUdD8c0\x00\x1f é▁中😀𐀀'), max_size=60) | st.text(max_size=60)
KEEP = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONG_BYTES", 12)
    monkeypatch.setattr(json_lines, "_PART_BYTES", 16)
    monkeypatch.setattr(text_module, "_PART", 7)


@KEEP
@given(text=TEXTS, other=TEXTS, ascii_only=st.booleans())
def test_a_long_line_is_parsed_as_any_other(small_limits: None, text: str, other: str, ascii_only: bool) -> None:
    fields = {"id": 3, "text": text, "meta": {"name": "short"}, "other": other, "list": [1.5, None, 'qu"ote']}
    line = json.dumps(fields, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    parsed: Any = parse_long_line(line)
    for key in ("text", "other"):
        assert isinstance(parsed[key], bytearray) == (
            len(json.dumps(fields[key], ensure_ascii=ascii_only).encode()) > 12
        )
        parsed[key] = to_str(parsed[key])
    assert parsed == fields


@KEEP
@given(
    parts=st.lists(
        st.sampled_from([r"\ud83d", r"\uDE00", r"\\ud83d", "a", r"\n", r"\ud7ff", "é", "\U0001f600"]), max_size=30
    )
)
def test_a_lone_surrogate_becomes_a_replacement_character_wherever_a_long_text_is_cut(
    small_limits: None, parts: list[str]
) -> None:
    joined = "".join(parts)
    wanted: str = json.loads(f'"{joined}"')
    repaired = re.sub("[\ud800-\udfff]", "\ufffd", wanted)
    parsed = parse_long_line(f'{{"text": "{joined}", "x": NaN}}'.encode())
    assert to_str(parsed["text"]) == repaired
    assert isinstance(parsed, RepairedObject) == (repaired != wanted)


@KEEP
@given(text=TEXTS)
def test_parts_join_to_the_text_and_cut_no_character(small_limits: None, text: str) -> None:
    data = text.encode()
    for kind in (text, data, bytearray(data)):
        parts = list(iter_utf8_chunks(kind, 5))
        assert b"".join(parts) == data
        assert "".join(part.decode() for part in parts) == text
    assert is_utf8(memoryview(data))


@KEEP
@given(data=st.binary(max_size=40))
def test_utf8_is_told_from_other_bytes(small_limits: None, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        assert not is_utf8(memoryview(data))
    else:
        assert is_utf8(memoryview(data))


@pytest.mark.parametrize(
    "wrong",
    [
        rb"\x" + rb"a" * 20,
        b"\xff" * 20,
        b"\n" * 20,
        rb"\u12" * 9,
    ],
)
def test_a_long_line_that_is_no_json_is_refused(small_limits: None, wrong: bytes) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        parse_long_line(b'{"text": "' + wrong + b'"}')
