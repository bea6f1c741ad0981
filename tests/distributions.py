"""Installed distributions and their requirements, and virtual environments that contain only some of them."""

import venv
from collections.abc import Collection
from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tinyllama


def with_requirements(names: Collection[str], without: Collection[str] = ()) -> set[str]:
    """Return distributions with their requirements, without extras; requirements in `without` are not followed."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found or name in without:
            continue
        found.add(name)
        parsed = [Requirement(line) for line in requires(name) or ()]
        left += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def create_environment(folder: Path, names: Collection[str]) -> Path:
    """Create a virtual environment with tinyllama and links to these distributions; return its Python."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tinyllama").symlink_to(Path(tinyllama.__file__).parent)
    for found in map(distribution, names):
        tops = {path.parts[0] for path in found.files or ()}
        for top in (top for top in tops - {"..", "__pycache__"} if not top.endswith(".pth")):
            if not (packages / top).exists():  # distributions may share a folder, such as `nvidia`
                (packages / top).symlink_to(str(found.locate_file(top)))
    return folder / "bin" / "python"
