"""Files that yield no document, or whose rows are mostly rejected: the lines that report them, with remedies.

Tasks' completion records and the store's manifest list these files; a store without any has no list.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllama.errors import InputError
from tinyllama.prepare.holdout import HELD_OUT
from tinyllama.prepare.rows import RejectedRow, SourceRow

_MOST_KEPT = 100  # files in a manifest
_MOST_SHOWN = 10
_NAME_FIELD = "name the field or column that holds the documents as text"
_REMEDIES = {
    "invalid JSON$|not a JSON object$": "one JSON object per line is expected",
    ".* UTF-8( text)?$": "convert it to UTF-8",
    "no meta.redpajama_set_name$": "no rows of SlimPajama, so name another format",
    "no |.* is not text$": _NAME_FIELD,
    "empty": "put text there",
    "longer than": "split it, such as by the source's separator, or write one JSON object per line",
    "more fields than columns$": 'put fields that hold a comma in "',
    "excluded: ": "correct include and exclude",
    f"{HELD_OUT}$": "set holdout: tail in the source, or for a text a separator, or lower data.validation_fraction",
}
"""Remedies by the most frequent reason."""
Entry = dict[str, Any]


class FileTally:
    """Counts of one file's usable and rejected rows."""

    def __init__(self, path: str) -> None:
        self.path, self.usable, self.chosen = path, 0, True
        self.rejected: Counter[str] = Counter()

    def count(self, row: SourceRow | RejectedRow) -> None:
        """Count a row; one that the recipe excludes counts neither as usable nor as rejected."""
        if isinstance(row, SourceRow):
            self.usable += 1
        elif row.is_intentional:
            self.chosen = False
        else:
            self.rejected[row.reason] += 1

    def doubts(self) -> list[Entry]:
        """Return the file's entry in a list if it is in doubt, else an empty list."""
        rejected = self.rejected.total()
        if rejected > self.usable or (not self.usable and self.chosen):
            reasons = dict(sorted(self.rejected.items()))
            return [{"file": self.path, "rows": self.usable + rejected, "rejected": reasons}]
        return []


def in_doubt(entries: Iterable[Entry]) -> Entry:
    """Return a source's entry in the store's manifest: the number of files in doubt, and the first of them."""
    every = list(entries)
    return {"count": len(every), "first": every[:_MOST_KEPT]}


def doubt_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each of the first files in doubt."""
    lines = []
    for fields in manifest["sources"].values():
        found = fields.get("files_in_doubt", {"count": 0, "first": []})
        lines += [_line(entry) for entry in found["first"][:_MOST_SHOWN]]
        if (more := found["count"] - _MOST_SHOWN) > 0:
            lines.append(f"and {more:,} more files; the rows at fault are listed in rejects.jsonl")
    return lines


def _line(entry: Entry) -> str:
    rejected: Counter[str] = Counter(entry["rejected"])
    if not rejected:
        return f"{entry['file']}: holds no rows; take it out, if that is not meant"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())
    how_many = f"{rejected.total():,} of {entry['rows']:,} rows"
    remedy = remedy_of(rejected)
    if remedy == _NAME_FIELD and rejected.total() < entry["rows"]:  # other rows have it
        remedy = "give those rows a text, or take them out"
    return f"{entry['file']}: {how_many} rejected ({reasons}); {remedy}"


def remedy_of(reasons: Counter[str]) -> str:
    """Return the remedy for rejected rows, by the most frequent reason."""
    reason = max(reasons, key=lambda one: reasons[one], default="empty")
    return next((remedy for pattern, remedy in _REMEDIES.items() if re.match(pattern, reason)), "see its clean")


def refuse_doubts(store: str, manifest: Mapping[str, Any]) -> None:
    """Raise InputError where any file is in doubt."""
    if lines := doubt_lines(manifest):
        count = sum(fields.get("files_in_doubt", {"count": 0})["count"] for fields in manifest["sources"].values())
        files = "1 file gives" if count == 1 else f"{count:,} files give"
        raise InputError(f"{store}: {files} few documents or none, which --strict refuses: {lines[0]}")
