"""How far a release is: the bytes that lie in its folder, of those that its formats will take.

Reads the folder's sizes; writes progress to standard error. The library that writes a format says nothing meanwhile, so
its bytes are all that there is to count: within a tenth for models of more than a few million parameters.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllama.plan.disk import FORMAT_BYTES, release_bytes
from tinyllama.progress import BYTES, poll_progress


@contextmanager
def release_progress(part: Path, folder: Path, parameters: int, formats: Collection[str]) -> Iterator[None]:
    """Show how far a release is that is written to `part` and will be `folder`, until the block ends."""
    total = release_bytes(formats, parameters)

    def count() -> int:
        return min(total, sum(_size(path) for path in part.rglob("*")))

    def words() -> str:
        begun = [name for name in FORMAT_BYTES if (part / name).is_dir()]
        return f"writing {begun[-1]}" if begun else "reading the checkpoint"

    with poll_progress(f"releasing {folder.name}", total, BYTES, count, words, f"it will be {folder}") as begin:
        begin()
        yield


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed meanwhile
        return 0
