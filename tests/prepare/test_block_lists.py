"""Block lists match domains with their subdomains, and URLs with the pages below; bad lines are refused."""

from pathlib import Path

import pytest

from tinyllama.errors import InputError
from tinyllama.prepare.block_lists import FINEWEB, check_block_lists, read_index, url_reason, write_index

LINES = "# my list\n\nbad.example\nhttps://www.Mixed.example/Private/\nexample.org/ads?page\nmünchen.example\n"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.example/page", "blocked domain"),
        ("http://deep.under.BAD.example:8080", "blocked domain"),
        ("https://user@www.bad.example./", "blocked domain"),
        ("bad.example", "blocked domain"),
        ("https://notbad.example/", None),
        ("https://bad.example.org/", None),
        ("https://good.example/?from=https://bad.example/", None),
        ("https://mixed.example/Private", "blocked URL"),
        ("http://www.mixed.example/Private/deep/page.html#top", "blocked URL"),
        ("https://mixed.example/Privateer", None),
        ("https://mixed.example/", None),
        ("https://sub.mixed.example/Private", None),
        ("https://example.org/ads?page", "blocked URL"),
        ("https://example.org/ads", None),
        ("https://münchen.example/", "blocked domain"),
        ("", "no URL"),
        (None, "no URL"),
    ],
)
def test_entries_match_domains_and_pages(tmp_path: Path, url: str | None, reason: str | None) -> None:
    path = tmp_path / "list.txt"
    path.write_text(LINES, encoding="utf-8")
    check_block_lists([str(path)], "place")
    write_index([[FINEWEB], [str(path)]], tmp_path / "index", iter(()), 1)
    assert url_reason(url, read_index(tmp_path / "index", [str(path)]), [str(path)]) == reason


@pytest.mark.parametrize("line", ["localhost", "two words.example", "http:///path", "-bad-.example", "a..example"])
def test_a_line_that_is_no_domain_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"good.example\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"^place: .*list\.txt:2: .*not a domain") as error:
        check_block_lists([str(path)], "place")
    assert "\n" not in str(error.value)


def test_an_empty_list_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n", encoding="utf-8")
    names = [str(tmp_path / "list.txt")]
    write_index([names], tmp_path, iter(()), 0)
    assert url_reason("https://example.org/", read_index(tmp_path, names), names) is None


def test_the_words_of_fineweb_block_urls(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("bad.example\n", encoding="utf-8")
    names = [str(tmp_path / "list.txt")]
    write_index([names], tmp_path, iter(()), 0)
    index = read_index(tmp_path, names)
    assert url_reason("https://example.org/18abused/1", index, [FINEWEB]) == "blocked word"
    assert url_reason("https://example.org/history/2019", index, [FINEWEB]) is None


@pytest.mark.long
def test_the_lists_of_fineweb_have_domains_and_urls(tmp_path: Path) -> None:
    write_index([[FINEWEB]], tmp_path, iter(()), 0)
    index = read_index(tmp_path, [FINEWEB])
    assert len(index) > 4_000_000
    assert url_reason("https://www.pornhub.com/", index, [FINEWEB]) == "blocked domain"
    assert url_reason("https://en.wikipedia.org/wiki/Linux", index, [FINEWEB]) is None
