"""tiktoken rank files: ids by tiktoken's definition, Llama 3's special tokens, and damaged files."""

import base64
import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.vocabularies import EDGE_CASES, rank_file, trained_ranks
from transformers import AutoTokenizer

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.tokenizer import Tokenizer, ranks
from tinyllama.tokenizer.byte_level import BOS, byte_level_json, to_characters
from tinyllama.tokenizer.ranks import check_conversion, convert_ranks, merges_by_rank, special_tokens

PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
"""Llama 3's pattern as Meta published it."""
TEXTS = [*EDGE_CASES, " ".join(EDGE_CASES), "DON'T we'LL", "1234567", " xqzxqz xqz", f"a{BOS}b <|eot_id|>"]


def merged(found: Mapping[bytes, int], tokens: list[bytes]) -> list[bytes]:
    """Merge the tokens of a word as tiktoken does: the neighbors of the lowest rank, the leftmost ones of several."""
    pairs = [(found[a + b], place) for place, (a, b) in enumerate(pairwise(tokens)) if a + b in found]
    if not pairs:
        return tokens
    place = min(pairs)[1]
    return merged(found, [*tokens[:place], tokens[place] + tokens[place + 1], *tokens[place + 2 :]])


def ids_by_definition(found: Mapping[bytes, int], text: str) -> list[int]:
    words = [word.encode() for word in PATTERN.findall(text)]
    parts = [[word] if word in found else merged(found, [bytes([byte]) for byte in word]) for word in words]
    return [found[token] for tokens in parts for token in tokens]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tokenizer import` writes for a small rank file."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tokenizer.model").write_bytes(rank_file(trained_ranks()))
    assert cli.main(["tokenizer", "import", str(folder), str(folder / "imported")]) == 0
    return folder / "imported"


def test_imported_ids_equal_the_definition(imported: Path) -> None:
    tokenizer = Tokenizer.load(imported)
    assert tokenizer._encoder is not None
    for text in [*TEXTS, python_sources(31)[30]]:
        ids = ids_by_definition(trained_ranks(), text)
        assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(" xqzxqz") == [600]


def test_imported_folder_has_the_same_ids_in_transformers_and_from_the_rank_file(imported: Path) -> None:
    ours, theirs = Tokenizer.load(imported), AutoTokenizer.from_pretrained(imported)
    again = Tokenizer.load(imported.with_name("tokenizer.model"))
    assert (again.digest, again.bos_id, again.eos_id) == (ours.digest, 602, 603)
    assert sorted(path.name for path in imported.iterdir()) == [
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert (theirs.bos_token_id, theirs.eos_token_id) == (602, 603)
    for text in TEXTS[:-1]:
        assert theirs(text).input_ids == [602, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(TEXTS[-1]).input_ids[2] == 602  # unlike `encode`, transformers finds special tokens in a text


@settings(deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=12), words=st.text("ab", max_size=24)
)
def test_any_ranks_merge_as_by_the_definition(tokens: list[str], words: str) -> None:
    """Tokens in any order of ranks, also before their parts and with repeated letters."""
    found = {bytes([byte]): byte for byte in range(256)}
    found |= {token.encode(): rank for rank, token in enumerate(tokens, 256)}
    document = byte_level_json([to_characters(token) for token in found], merges_by_rank(found))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    assert theirs.encode(words, add_special_tokens=False).ids == ids_by_definition(found, words)


def test_llama_3_has_256_special_tokens_with_metas_ids() -> None:
    found = {rank.to_bytes(3): rank for rank in range(128_000)}
    names = special_tokens("llama3", found)
    assert len(names) == len(set(names)) == 256
    ids = {name: 128_000 + place for place, name in enumerate(names)}
    assert (ids["<|begin_of_text|>"], ids["<|end_of_text|>"], ids["<|eot_id|>"]) == (128_000, 128_001, 128_009)
    assert (ids["<|start_header_id|>"], ids["<|python_tag|>"]) == (128_006, 128_010)
    assert names[-1] == "<|reserved_special_token_245|>"


def test_other_number_of_ranks_is_a_warning_with_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.tiktoken").write_bytes(rank_file(trained_ranks()))
    assert Tokenizer.load(tmp_path / "own.tiktoken").vocab_size == 604
    (line,) = capsys.readouterr().err.splitlines()
    assert "602 ranks" in line
    assert "<|begin_of_text|> (602) and <|end_of_text|> (603)" in line


@pytest.mark.parametrize(
    ("lines", "content", "keyword"),
    [
        ((400, 401), b"", "no token has the rank 400"),
        ((400, 401), b"eHF6 700\n", "no token has the rank 400, but one has the rank 700"),
        ((400, 401), b"eHF6 399\n", "line 401 repeats the rank 399"),
        ((400, 401), b"IQ== 400\n", "line 401 repeats the token b'!'"),
        ((400, 401), b"e*HF6 400\n", "line 401 is not"),
        ((400, 401), b"eHF 400\n", "line 401 is not"),
        ((400, 401), b"eHF6\n", "line 401 is not"),
        ((400, 401), b"eHF6 -1\n", "line 401 is not"),
        ((400, 401), b"eHF6 4 0\n", "line 401 is not"),
        ((400, 401), b"eHF6 %s\n" % (b"9" * 5000), "line 401 is not"),
        ((400, 602), b"eHF", "line 401 is not"),
        ((0, 1), b"eHF6 0\n", "no token for the byte 0x21"),
        ((602, 602), base64.b64encode(b"x" * 257) + b" 602\n", "line 603 is not"),
        ((602, 602), base64.b64encode(b"<|end_of_text|>") + b" 602\n", "rank 602 is the text of the special token"),
    ],
)
def test_damaged_rank_file_is_refused_in_one_line(
    lines: tuple[int, int], content: bytes, keyword: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = rank_file(trained_ranks()).splitlines(keepends=True)
    changed[slice(*lines)] = [content]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(changed))
    assert cli.main(["tokenizer", "import", str(tmp_path / "tokenizer.model"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama: {tmp_path / 'tokenizer.model'}: ")
    assert keyword in line
    assert not (tmp_path / "out").exists()


def test_ranks_of_another_known_tokenizer_are_refused_with_its_name(tmp_path: Path) -> None:
    single = [bytes([byte]) for byte in range(256)]
    tokens = [*single, *(number.to_bytes(3) for number in range(100_000))]
    (tmp_path / "cl100k.tiktoken").write_bytes(rank_file({token: rank for rank, token in enumerate(tokens)}))
    with pytest.raises(InputError, match=r"100,256.*GPT-4.*another rule"):
        Tokenizer.load(tmp_path / "cl100k.tiktoken")


def test_conversion_with_other_ids_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = trained_ranks()
    merges = merges_by_rank(found)
    random.Random(0).shuffle(merges)
    monkeypatch.setattr(ranks, "merges_by_rank", lambda _: merges)
    wrong = tokenizers.Tokenizer.from_str(json.dumps(convert_ranks("wrong", found)))
    with pytest.raises(InputError, match="wrong: the converted tokenizer changes"):
        check_conversion("wrong", found, wrong)
