"""E-mail addresses and public IPv4 addresses are replaced; other text is not changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("regex", reason="the extra `clean` is not installed")

from datatrove.pipeline.formatters import PIIFormatter

from tinyllama.prepare.personal_data import mask_emails, mask_ip_addresses

FIRST, SECOND = "email@example.com", "firstname.lastname@example.org"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+news@mail.acme.co.uk.", f"Write to {FIRST}."),
        ("<a@b.org>, c@d.net; e@f.net", f"<{FIRST}>, {SECOND}; {FIRST}"),
        ("no@tld, @handle, a @ b, user@localhost", "no@tld, @handle, a @ b, user@localhost"),
        (f"{'x' * 300} a@b.org {'y' * 300}", f"{'x' * 300} {FIRST} {'y' * 300}"),
        ("@@@ a@b.org @", f"@@@ {FIRST} @"),
        ("", ""),
    ],
    ids=["one", "cycle", "none", "far", "signs", "empty"],
)
def test_email_addresses_are_replaced_in_a_cycle(text: str, expected: str) -> None:
    assert mask_emails(text) == expected


def test_public_ip_addresses_are_replaced_and_others_kept() -> None:
    text = "8.8.8.8 and 1.1.1.1; 192.168.0.1, 10.1.2.3, 127.0.0.1, 169.254.1.1"
    expected = "22.214.171.124 and 126.96.36.199; 192.168.0.1, 10.1.2.3, 127.0.0.1, 169.254.1.1"
    assert mask_ip_addresses(text) == expected


@pytest.mark.parametrize("text", ["v1.2.3.4", "version1.2.3.4", "999.8.8.8.8 1.300.8.8.8.8"])
def test_numbers_of_versions_are_kept(text: str) -> None:
    assert mask_ip_addresses(text) == text


@given(st.lists(st.sampled_from(["a", "B9", ".", "-", "@", " ", "b.org", " 8.8.8.8", " 10.0.0.1", "é", "_", "\n"])))
def test_the_first_document_is_masked_as_datatrove_does(parts: list[str]) -> None:
    text = "".join(parts)
    assert mask_ip_addresses(mask_emails(text)) == PIIFormatter().format(text)


def test_long_text_without_spaces_takes_linear_time() -> None:
    text = "ab+/" * 500_000 + "@" + "cd-." * 500_000  # datatrove would need hours
    assert mask_emails(text) == text
