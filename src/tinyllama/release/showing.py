"""How far a release is: the bytes that lie in its folder, of those that its formats will take.

Reads the folder's sizes; writes progress to standard error. The library that writes a format says nothing meanwhile, so
its bytes are all that there is to count: within a tenth for models of more than a few million parameters.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyllama.progress import BYTES, track_count

_BYTES_A_WEIGHT = {
    "huggingface": 2.0,
    "gguf": 2 + 1.07 + 0.63,  # F16; Q8_0 and Q4_K_M with their scales
    "ctranslate2": 4 + 1.0,
}


@contextmanager
def shown(part: Path, folder: Path, parameters: int, formats: Collection[str]) -> Iterator[None]:
    """Show how far a release is that is written to `part` and will be `folder`, until the block ends."""
    wanted = {"huggingface", *formats}
    total = int(parameters * sum(_BYTES_A_WEIGHT[name] for name in wanted))

    def count() -> int:
        return min(total, sum(_size(path) for path in part.rglob("*")))

    def words() -> str:
        begun = [name for name in _BYTES_A_WEIGHT if (part / name).is_dir()]
        return f"writing {begun[-1]}" if begun else "reading the checkpoint"

    with track_count(f"releasing {folder.name}", total, BYTES, count, words, f"it will be {folder}") as begin:
        begin()
        yield


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed meanwhile
        return 0
