"""Masking of personal data in text: e-mail addresses and public IPv4 addresses, as in FineWeb.

The patterns and the replacements are those of datatrove's PIIFormatter. datatrove continues its cycle of replacements
from document to document, and searches an e-mail address in quadratic time in text without spaces. Here, the cycle
begins again in each document, and only the surroundings of each @ are searched. Version numbers such as v1.2.3.4, which
datatrove replaces, are kept.
"""

import re
from itertools import cycle
from typing import Any

from datatrove.pipeline.formatters import PIIFormatter

_LOCAL_CHARACTERS, _DOMAIN_CHARACTERS = 64, 255
"""Maximum length of the two parts of an e-mail address (RFC 5321, section 4.5.3.1)."""
_VERSION_START = re.compile(r"(?:[^\W_]|\d\.)$")
"""Characters before digits that are part of a version or a longer number, not of an IP address."""
_FORMATTER = PIIFormatter()


def mask_emails(text: str) -> str:
    """Replace e-mail addresses by addresses of example.com and example.org."""
    replacer = _FORMATTER.emails_replacer
    replacements, parts, done = cycle(replacer.replacements), list[str](), 0
    at = text.find("@")
    while at >= 0:
        start, end = max(done, at - _LOCAL_CHARACTERS), at + 1 + _DOMAIN_CHARACTERS
        if match := replacer.regex.search(text, start, end):
            parts += text[done : match.start()], next(replacements)
            done = match.end()
        at = text.find("@", max(at + 1, done))
    return "".join([*parts, text[done:]])


def mask_ip_addresses(text: str) -> str:
    """Replace public IPv4 addresses by addresses that did not answer; keep private and reserved addresses.

    Numbers after a letter, a digit, or a digit and a full stop are kept.
    """
    replacer: Any = _FORMATTER.ip_replacer
    replacements = cycle(replacer.replacements)

    def replace(match: re.Match[str]) -> str:
        is_version = _VERSION_START.search(text, max(0, match.start() - 2), match.start())
        return match[0] if is_version or not replacer.validator(match[0]) else next(replacements)

    return str(replacer.regex.sub(replace, text))


MASKS = {"e-mail addresses masked": mask_emails, "public IPv4 addresses masked": mask_ip_addresses}
"""Masking functions by the reason that the store's manifest counts."""
