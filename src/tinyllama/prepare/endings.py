"""Kind and packing of a file by the ending of its name, in upper or lower case.

A format reads the files of its kinds; every other file under a source's path is counted by its ending.
"""

from tinyllama.recipe.loading import printable

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Ending and name of each packing; JSON lines, text and csv files are read packed too."""
_KINDS = {
    "lines": (".jsonl", ".ndjson", ".jsonlines", ".json"),
    "text": (".txt",),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
_ENDINGS = {ending: kind for kind, endings in _KINDS.items() for ending in endings}
_PACKABLE = ("lines", "text", "csv")
_FORMATS = {
    "slimpajama": ("lines", "parquet"),
    "starcoderdata": ("parquet",),
    "jsonl": ("lines",),
    "parquet": ("parquet",),
    "text": ("text",),
    "csv": ("csv",),
    "huggingface": ("lines", "parquet", "csv", "arrow"),
}


def split_ending(name: str) -> tuple[str, str, str]:
    """Split a name into stem, ending and ending of the packing, in lower case; `""` for an ending that it lacks."""
    stem, packing = _split(name)
    if packing not in PACKINGS:
        return stem, packing, ""
    stem, ending = _split(stem)
    return stem, ending, packing


def _split(name: str) -> tuple[str, str]:
    stem, _, last = name.rpartition(".")
    is_hidden = not stem or stem.endswith("/")
    return (name, "") if is_hidden or not last or "/" in last else (stem, f".{last.lower()}")


def packing_of(name: str) -> str | None:
    """Return the packing of a file by its name; None where it is not packed."""
    return PACKINGS.get(_split(name)[1])


def category_of(name: str, format: str) -> str:
    """Return the kind that a file is read as; a file that the recipe names itself may have any ending."""
    kinds = _FORMATS[format]
    return kinds[0] if len(kinds) == 1 else _ENDINGS.get(split_ending(name)[1], "lines")


def is_read(name: str, format: str) -> bool:
    """Return whether a format reads a file that it finds in a folder."""
    _, ending, packing = split_ending(name)
    kind = _ENDINGS.get(ending)
    return kind in _FORMATS[format] and (not packing or kind in _PACKABLE)


def endings_of(format: str) -> str:
    """Return the endings that a format reads, for a message."""
    kinds = _FORMATS[format]
    names = " or ".join(ending for kind in kinds for ending in _KINDS[kind])
    packings = " or ".join(PACKINGS)
    return f"{names} file (packed: {packings})" if set(kinds) & set(_PACKABLE) else f"{names} file"


def unread(name: str) -> str:
    """Return the reason to count an unread file under: `ending .md`, `ending .jsonl.lz4`; numbers are no endings."""
    stem, last = _split(name)
    _, before = _split(stem)
    if not last or last[1:].isdigit():
        return "no ending"
    belongs = before[1:].isalpha() and (last in PACKINGS or before in _ENDINGS)
    return f"ending {printable(before + last if belongs else last)}"
