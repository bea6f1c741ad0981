"""A run as one HTML file, to attach, print or archive: what it is, how it went and what came of it.

Reads a run's folder and writes RUN/report.html. The file contains everything that it shows, and needs no script and no
network.
"""

from collections.abc import Sequence
from pathlib import Path

from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.files import atomic_write
from tinyllama.report.page import render_page
from tinyllama.report.run_data import read_run

__all__ = ["write_report"]


def write_report(run: Path, compare: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of a run, compared with other runs, and return its path: by default RUN/report.html.

    Raises InputError where one of the folders is not a run, or a file of it is damaged.
    """
    path = output or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: a folder; --output takes a file, such as {path / 'report.html'}")
    with translate_damage_errors(run):
        html = render_page(read_run(run), [read_run(other) for other in compare])
    with atomic_write(path) as file:
        file.write(html.encode())
    return path
