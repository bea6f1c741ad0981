"""Printing of text that may come from a file, a recipe or an error: control characters appear as escapes."""

import re
import sys

# C0 and C1 except tab and newline, line separators, characters that change the direction of text, and lone surrogates,
# which no stream can encode.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return a text in which each control character is its escape, such as `\x1b`; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def echo(text: object = "", to_stderr: bool = False) -> None:
    """Print a text and a newline at once, without the control characters in it."""
    print(visible(str(text)), file=sys.stderr if to_stderr else sys.stdout, flush=True)
