"""Places where a text may be cut so that the known pre-tokenizers split both parts as they split the complete text.

The pre-tokenizers (`PRE_TOKENIZERS` of `byte_level`) match one regular expression from left to right, without
lookbehind. A text that starts at the start of a pretoken is therefore always split in the same way. The cut may also be
inside a run of characters of one class that is one pretoken, if its second part alone gives a pretoken with the same
end.
"""

import sys
import unicodedata
from functools import cache

_NEWLINES = "\r\n"
_CONTROL_SPACES = "\t\n\v\f\r\x85"
_BLANKS = "\t\v\f\x85 \xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""White space, without `_NEWLINES`."""
UNASSIGNED = "Cn"
"""Category of characters that Python's version of Unicode lacks; other versions may have digits or marks there."""


class Cuts:
    """Places of one text where it may be cut."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._runs: dict[str, tuple[int, int]] = {}

    def __contains__(self, place: int) -> bool:
        """Return whether all known pre-tokenizers certainly split `text[:place]` and `text[place:]` as the text.

        In the first part, the last 8 characters may be split differently. `place` is at least 1.
        """
        text = self._text
        if place >= len(text):
            return False
        before, after = _class_of(text[place - 1]), _class_of(text[place])
        if before != after:
            return bool(before and after) and _is_boundary(text[place - 1], before, text[place], after)
        if before == "N":  # Llama 3 splits a number into groups of 3 digits
            return (place - self._start_of_run(place, _numbers())) % 3 == 0
        if before == "O":
            # an apostrophe or a sign would otherwise be the first character of the letters that follow
            return place + 1 < len(text) and _class_of(text[place + 1]) == "O"
        if before == "L":
            return text[place - 2 : place - 1] != "'"  # not inside a contraction such as 'll
        return before == "Z" and self._is_inside_white_space(place)

    def _is_inside_white_space(self, place: int) -> bool:
        """Return whether a place between two characters of white space is a cut.

        Llama 3 and Qwen 2 have one pretoken from the start of white space to its last newline. An end between a newline
        and a later one, not directly after a newline, would split it. Newlines directly after punctuation belong to
        the punctuation, up to the first blank; a start inside them would join them to later newlines.
        """
        text = self._text
        if text[place - 1] not in _NEWLINES:
            start = self._start_of_run(place, _BLANKS)
            return start == 0 or text[start - 1] not in _NEWLINES
        if text[place] not in _NEWLINES:
            return True
        start = self._start_of_run(place, _NEWLINES)
        return start == 0 or _class_of(text[start - 1]) in {*"LNZ"}

    def _start_of_run(self, place: int, characters: str) -> int:
        """Return where the run of these characters before a place starts; a run is searched for its start only once."""
        start, end = self._runs.get(characters, (0, 0))
        if not start < place <= end:
            start = len(self._text[:place].rstrip(characters))
            self._runs[characters] = start, place
        return start


@cache
def _numbers() -> str:
    """Return all numbers; `isnumeric` alone also holds for some Chinese letters."""
    numeric = filter(str.isnumeric, map(chr, range(sys.maxunicode + 1)))
    return "".join(character for character in numeric if _class_of(character) == "N")


def _class_of(character: str) -> str:
    """Return L (letter), N (number), Z (white space), O (other), or nothing if a cut there may not be exact.

    A normalizer can move combining marks. The class of an unassigned character depends on the version of Unicode.
    """
    category = unicodedata.category(character)
    if category == UNASSIGNED or unicodedata.combining(character):
        return ""
    if category[0] in "LNZ":
        return category[0]
    return "Z" if character in _CONTROL_SPACES else "O"


def _is_boundary(last: str, before: str, first: str, after: str) -> bool:
    """Return whether a pretoken certainly ends between two characters of the classes `before` and `after`."""
    return (
        before in "LN"
        or (before == "O" and (after == "N" or (after == "Z" and first not in _NEWLINES)))
        or last in _NEWLINES
    )
