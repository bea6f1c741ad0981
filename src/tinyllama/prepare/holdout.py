"""Choice of the validation text: documents by their content, so that copies get the same split; or each one's end."""

import hashlib

from tinyllama.data.store import TokenStore
from tinyllama.text import TextLike, iter_utf8_chunks, to_str, utf8_boundary_before

HELD_OUT = "held out for validation"
"""The reason that documents of the validation split are counted under."""
TAIL_HELD_OUT = "end held out for validation"
"""The reason that documents are counted under whose end is in the validation split."""


def hash_to_unit_interval(text: TextLike) -> float:
    """A number of [0, 1) that a text's UTF-8 bytes decide; even over many texts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in iter_utf8_chunks(text):
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") / 2**64


def split_tail(text: TextLike, share: float) -> tuple[TextLike, TextLike]:
    """Split off the last `share` of a text's UTF-8 bytes, between two characters.

    The second part is empty if the text is too short for two.
    """
    data = text.encode() if isinstance(text, str) else text
    size = int(len(data) * share)
    cut = utf8_boundary_before(data, len(data) - size) if size else 0
    if not cut:
        return text, ""
    parts = data[:cut], data[cut:]
    return (to_str(parts[0]), to_str(parts[1])) if isinstance(text, str) else parts


def how_to_hold_out(store: TokenStore, name: str) -> str:
    """Return the remedy for a source of a store that has too little text to validate on."""
    manifest, rows = store.manifest, store[f"{name}/train"].manifest["rows"]
    source, place = manifest["sources"][name], f"data.sources.{name}"
    if f"{name}/validation" in store and not (HELD_OUT in rows["left_out"] or TAIL_HELD_OUT in rows.get("changed", ())):
        return "add text to its validation files"
    raise_it, has_tail = "raise data.validation_fraction", source.get("holdout") == "tail"
    options = [] if has_tail else [f"{place}.holdout: tail"]
    if source["format"] == "text" and not source.get("separator"):
        options.insert(0, f"{place}.separator")
    ways = [f"set {' or '.join(options)}"] if options else []
    if has_tail or rows["kept"] > 1:
        ways.insert(0, raise_it)
    elif not manifest["validation_fraction"]:
        ways = [f"{raise_it} and {way}" for way in ways]
    return f"{' or '.join(ways)}, and prepare another data.store"
