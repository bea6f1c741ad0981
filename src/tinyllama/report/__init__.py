"""A run as one HTML file: what it is, what it did, what came of it; to attach, to print, to put before a reviewer.

Reads a run's folder, writes RUN/report.html. Everything is in that one file, its pictures and colours too, and it needs
no script and no network, so that it still shows the same in ten years.
"""

from collections.abc import Sequence
from pathlib import Path

from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.files import atomic_write

__all__ = ["report"]


def report(run: Path, compare: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write a run's report, to RUN/report.html unless `output` names another file; return where it is.

    `compare` are other runs that stand beside it. Raises InputError where one of them is no run, or a file of it is
    broken.
    """
    # A release's card has this package's pictures, and a report has the card's tables: neither may wait for the other.
    from tinyllama.report.page import page  # noqa: PLC0415
    from tinyllama.report.reading import read_run  # noqa: PLC0415

    path = output or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: a folder; --output takes the file to write, such as {path / 'report.html'}")
    with translate_damage_errors(run):
        html = page(read_run(run), [read_run(other) for other in compare])
    with atomic_write(path) as file:
        file.write(html.encode())
    return path
