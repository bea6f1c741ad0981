"""Warnings about a store's data, each with a remedy: files with few usable rows, sources without validation text.

Files with few usable rows are called suspect. The completion record of a task and the store's manifest list them.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError

HELD_OUT = "held out for validation"
"""Drop reason of documents that are in the validation split."""
TAIL_HELD_OUT = "end held out for validation"
"""Change reason of documents whose tail is in the validation split."""
MAX_LISTED_FILES = 100
"""Maximum number of suspect files that a manifest lists per source."""
_MAX_SHOWN_FILES = 10
_REMEDIES = {
    "invalid JSON$|not a JSON object$": "one JSON object per line is expected",
    ".* UTF-8( text)?$": "convert it to UTF-8",
    "no meta.redpajama_set_name$": "these are not rows of SlimPajama, so set another format",
    "no |.* is not text$": "set the source's text to the field or column that contains the documents",
    "empty": "add text",
    "longer than": "split it, for example with the source's separator, or write one JSON object per line",
    "more fields than columns$": 'put fields that contain a comma in "',
    "excluded: ": "correct include and exclude",
    "fewer than .* tokens$": "lower the source's min_tokens",
    f"{HELD_OUT}$": "set the source's holdout to tail, set a separator for text, or lower data.validation_fraction",
}
"""Remedy for rejected rows, by a pattern of the most frequent reason."""


def too_short(min_tokens: int) -> str:
    """Return the drop reason of documents with fewer than `min_tokens` tokens."""
    return f"fewer than {min_tokens:,} tokens"


def rejection_remedy(reasons: Counter[str]) -> str:
    """Return the remedy for the most frequent reason of rejected rows."""
    reason = max(reasons, key=reasons.__getitem__, default="empty")
    remedies = (remedy for pattern, remedy in _REMEDIES.items() if re.match(pattern, reason))
    return next(remedies, "check the source's clean settings")


def no_document_error(name: str, reasons: Counter[str], place: str = "") -> InputError:
    """Return the error for a source without documents to train on; `reasons` counts the unused rows by reason."""
    counts = ", ".join(f"{count:,} rows {reason}" for reason, count in reasons.most_common()) or "no rows at all"
    return InputError(
        f"data.sources.{name}: no document left to train on ({counts}){place}; {rejection_remedy(reasons)}"
    )


def file_warning_lines(manifest: Mapping[str, Any]) -> list[str]:
    """Return warning lines for the first suspect files in a store's manifest, and lines that count the others."""
    lines: list[str] = []
    for fields in manifest["sources"].values():
        found = fields.get("suspect_files", {"count": 0, "first": []})
        lines += map(_file_warning, found["first"][:_MAX_SHOWN_FILES])
        if (more := found["count"] - _MAX_SHOWN_FILES) > 0:
            lines.append(f"and {more:,} more files; rejects.jsonl lists the rejected rows")
    return lines


def _file_warning(entry: dict[str, Any]) -> str:
    rejected: Counter[str] = Counter(entry["rejected"])
    if not rejected:
        return f"{entry['file']}: contains no rows; exclude it if this is not intended"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())
    counts = f"{rejected.total():,} of {entry['rows']:,} rows rejected ({reasons})"
    return f"{entry['file']}: {counts}; {rejection_remedy(rejected)}"


def check_no_file_warnings(store: str, manifest: Mapping[str, Any]) -> None:
    """Raise InputError if any file of a store is suspect."""
    if lines := file_warning_lines(manifest):
        count = sum(fields.get("suspect_files", {"count": 0})["count"] for fields in manifest["sources"].values())
        files = "1 file has" if count == 1 else f"{count:,} files have"
        raise InputError(f"{store}: {files} few usable rows or none, which --strict refuses: {lines[0]}")


def holdout_remedy(store: TokenStore, name: str) -> str:
    """Return the remedy for a source of a store that has too little validation text."""
    manifest, rows = store.manifest, store[f"{name}/train"].manifest["rows"]
    source, field = manifest["sources"][name], f"data.sources.{name}"
    if f"{name}/validation" in store and not (HELD_OUT in rows["dropped"] or TAIL_HELD_OUT in rows.get("changed", ())):
        return "add text to its validation files"
    options = ["raise data.validation_fraction"]
    if source["format"] == "text" and not source.get("separator"):
        options.append(f"set {field}.separator")
    if source.get("holdout") != "tail":
        options.append(f"set {field}.holdout: tail")
    return f"{' or '.join(options)}, and prepare the data with another data.store"
