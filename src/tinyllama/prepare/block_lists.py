"""Block lists of domains and URLs, and the index of each combination of lists, which a cleaning stage writes.

A file has one entry per line. A domain blocks its pages and those of its subdomains; a URL blocks its page and the
pages below. `fineweb` names the lists and words of datatrove, which FineWeb was filtered with. They have millions of
entries, so the index consists of hashes: 8 bytes per entry, in ascending order.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from tinyllama.errors import InputError
from tinyllama.files import atomic_write

FINEWEB = "fineweb"
"""Name of datatrove's lists in `url_block_lists`."""
_MIN_SOFT_WORDS = 2  # FineWeb's threshold
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DOMAIN = re.compile(r"(?=.{1,253}$)(?!-)[\w-]{1,63}(?:\.[\w-]{1,63})+")
_SEPARATORS = re.compile(r"[/?#]")


def check_block_lists(names: Sequence[str], place: str) -> None:
    """Raise InputError if a file is missing or unreadable, or if a line is neither a domain nor a URL."""
    for name in names:
        for _ in _read_entries(name, place) if name != FINEWEB else ():
            pass


def _read_entries(name: str, place: str = "data.sources.*.clean.url_block_lists") -> Iterator[str]:
    try:
        with Path(name).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                entry = _normalize(line)
                if not entry or line.lstrip().startswith("#"):
                    continue
                if not _DOMAIN.fullmatch(_SEPARATORS.split(entry, maxsplit=1)[0]):
                    raise InputError(
                        f"{place}: {name}:{number}: {line.strip()!r} is not a domain or URL; correct or delete it"
                    )
                yield entry
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(
            f"{place}: {name}: {reason}; give a text file with one domain or URL per line, or {FINEWEB}"
        ) from None


def _normalize(url: str) -> str:
    """Return a domain or URL without scheme, user, port, `www.` and final slash, with its host in lower case."""
    url = url.strip()
    if "://" in url:
        url = _SCHEME.sub("", url)
    found = _SEPARATORS.search(url)
    host = url[: found.start()] if found else url
    name = host.rpartition("@")[2].partition(":")[0].lower().strip(".").removeprefix("www.")
    return (name + url[len(host) :]).rstrip("/")


def write_index(wanted: Sequence[Sequence[str]], folder: Path, _: Iterator[Document], rank: int) -> None:
    """Write the index of the block lists `wanted[rank]` to `folder`, as task `rank` of a cleaning stage."""
    names = wanted[rank]
    parts = [_hashes(_fineweb_entries() if name == FINEWEB else _read_entries(name)) for name in names]
    with atomic_write(folder / f"{index_name(names)}.npy") as file:
        np.save(file, np.unique(np.concatenate(parts)))


def read_index(folder: Path, names: Sequence[str]) -> NDArray[np.uint64]:
    """Map the index of block lists into memory: hashes in ascending order."""
    index: NDArray[np.uint64] = np.load(folder / f"{index_name(names)}.npy", mmap_mode="r")
    return index


def index_name(*key: object) -> str:
    """Return the name of the file of an index, which sources with the same settings share."""
    return blake2b(repr(key).encode(), digest_size=8).hexdigest()


def _hashes(entries: Iterable[str]) -> NDArray[np.uint64]:
    digests = bytearray()
    for entry in entries:
        digests += blake2b(entry.encode(), digest_size=8).digest()
    return np.frombuffer(digests, dtype="<u8")


def _fineweb_entries() -> Iterator[str]:
    from datatrove.utils._import_utils import ASSETS_PATH  # noqa: PLC0415

    (archive,) = Path(ASSETS_PATH).glob("url_filterblacklists*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            for line in files.extractfile(member) or ():
                yield _normalize(line.decode(errors="replace"))


@lru_cache(maxsize=1)
def _fineweb_words() -> tuple[frozenset[str], frozenset[str], re.Pattern[str]]:
    """Return FineWeb's words that block a URL, those of which two block it, and the pattern of blocked parts."""
    from datatrove.pipeline.filters.url_filter import get_list  # noqa: PLC0415 - needs the extra `clean`
    from datatrove.utils._import_utils import ASSETS_PATH  # noqa: PLC0415

    hard, soft, parts = (
        frozenset(get_list(ASSETS_PATH, f"{name}.txt", set()))
        for name in ("banned_words", "soft_banned_words", "banned_subwords")
    )
    return hard, soft, re.compile("|".join(map(re.escape, sorted(parts))))


def url_reason(url: str | None, index: NDArray[np.uint64], names: Sequence[str]) -> str | None:
    """Return the reason to drop the document of a URL, or None; a document without a URL is dropped."""
    if not url:
        return "no URL"
    place = _normalize(url)
    host = _SEPARATORS.split(place, maxsplit=1)[0]
    labels = host.split(".")
    domains = [".".join(labels[start:]) for start in range(len(labels) - 1)]
    ends = (match.start() for match in _SEPARATORS.finditer(place))
    pages = [place[:end] for end in ends if end > len(host)] + [place] * (place != host)
    for reason, entries in (("domain", domains), ("URL", pages)):
        wanted = _hashes(entries)
        found = index[np.minimum(np.searchsorted(index, wanted), len(index) - 1)] if len(index) else wanted + 1
        if (found == wanted).any():
            return f"blocked {reason}"
    return _word_reason(url) if FINEWEB in names else None


def _word_reason(url: str) -> str | None:
    from datatrove.pipeline.filters.url_filter import normalize, normalizer  # noqa: PLC0415

    hard, soft, parts = _fineweb_words()
    words = set(normalizer.split(url))
    if words & hard or len(words & soft) >= _MIN_SOFT_WORDS or parts.search(normalize(url)):
        return "blocked word"
    return None
