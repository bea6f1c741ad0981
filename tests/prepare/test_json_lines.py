"""A line of JSON of many megabytes is parsed to the same values as any other, in little memory."""

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
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONG_BYTES", 12)
    monkeypatch.setattr(json_lines, "_PART_BYTES", 16)
    monkeypatch.setattr(text_module, "_CHUNK_SIZE", 7)


@many
@given(text=TEXTS, other=TEXTS, ascii_only=st.booleans())
def test_long_line_parses_like_any_other(small_limits: None, text: str, other: str, ascii_only: bool) -> None:
    fields = {"id": 3, "text": text, "meta": {"name": "short"}, "other": other, "list": [1.5, None, 'qu"ote']}
    line = json.dumps(fields, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    parsed: Any = parse_long_line(line)
    for key in ("text", "other"):
        num_bytes = len(json.dumps(fields[key], ensure_ascii=ascii_only).encode())
        assert isinstance(parsed[key], bytearray) == (num_bytes > 12)
        parsed[key] = to_str(parsed[key])
    assert parsed == fields


ESCAPES = [r"\ud83d", r"\uDE00", r"\\ud83d", "a", r"\n", r"\ud7ff", "é", "\U0001f600"]


@many
@given(parts=st.lists(st.sampled_from(ESCAPES), max_size=30))
def test_lone_surrogate_is_replaced_wherever_a_long_text_is_cut(small_limits: None, parts: list[str]) -> None:
    joined = "".join(parts)
    original: str = json.loads(f'"{joined}"')
    repaired = re.sub("[\ud800-\udfff]", "\ufffd", original)
    parsed = parse_long_line(f'{{"text": "{joined}", "x": NaN}}'.encode())
    assert to_str(parsed["text"]) == repaired
    assert isinstance(parsed, RepairedObject) == (repaired != original)


@many
@given(text=TEXTS)
def test_utf8_chunks_join_to_the_text_and_split_no_character(small_limits: None, text: str) -> None:
    data = text.encode()
    for kind in (text, data, bytearray(data)):
        chunks = list(iter_utf8_chunks(kind, 5))
        assert b"".join(chunks) == data
        assert "".join(chunk.decode() for chunk in chunks) == text


@many
@given(data=st.binary(max_size=40) | TEXTS.map(str.encode))
def test_is_utf8_agrees_with_python(small_limits: None, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        assert not is_utf8(memoryview(data))
    else:
        assert is_utf8(memoryview(data))


@pytest.mark.parametrize("wrong", [rb"\x" + rb"a" * 20, b"\xff" * 20, b"\n" * 20, rb"\u12" * 9])
def test_invalid_long_line_is_an_error(small_limits: None, wrong: bytes) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        parse_long_line(b'{"text": "' + wrong + b'"}')
