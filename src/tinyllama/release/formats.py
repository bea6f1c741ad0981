"""The formats of a release besides Hugging Face's, each made from the Hugging Face folder.

The libraries that write and run them are the extra `formats`; what is missing is said before anything is done.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError, RunStoppedError
from tinyllama.release.isolation import NAMES, crash_line, observe

LIBRARIES = {
    "huggingface": ("transformers",),
    "gguf": ("gguf", "llama_cpp"),
    "ctranslate2": ("ctranslate2", "transformers"),
}
"""What each format is written with, and what runs it in `tinyllama verify`."""
_FEW_TOKENS = 8
"""Enough for a product of matrices, which is where engines differ by CPU."""


def check_formats(formats: Collection[str]) -> None:
    """Raise InputError, naming the extra, where a library is missing that writes one of the formats."""
    require_libraries(library for name in formats if name != "huggingface" for library in LIBRARIES[name])


def require_libraries(names: Iterable[str]) -> None:
    """Raise InputError, naming the extra, where one of these libraries is not installed."""
    missing = next((name for name in names if find_spec(name) is None), None)
    if missing:
        raise InputError(f'{missing} is not installed; pip install "tinyllama[formats]"')


@dataclass(frozen=True)
class Format:
    """A format in a release: its name in the table, what runs it, and the path that the engine gets."""

    name: str
    engine: str
    path: str


def formats_of(files: Iterable[str]) -> list[Format]:
    """The formats that a release's files belong to, whether or not they are still there."""
    names = list(files)
    ggufs = {Path(name).stem.rpartition("-")[2]: name for name in names if name.startswith("gguf/")}
    folders = {Path(name).parts[1] for name in names if name.startswith("ctranslate2/")}
    pages = {Path(name).parts[0] for name in names} & {"huggingface"}
    return [
        *(Format(name, "transformers", name) for name in pages),
        *(Format(f"gguf {kind}", "llama_cpp", ggufs[kind]) for kind in ("F16", "Q8_0", "Q4_K_M") if kind in ggufs),
        *(Format(f"ctranslate2 {kind}", "ctranslate2", f"ctranslate2/{kind}") for kind in sorted(folders)),
    ]


def write_formats(part: Path, formats: Collection[str], name: str) -> None:
    """Write `part/gguf` and `part/ctranslate2`, where they are among the formats, from `part/huggingface`.

    Files of GGUF are called after `name`. Raises InputError for a tokenizer that a format has no place for, and
    RunStoppedError where the library that writes a format fails.
    """
    if "gguf" in formats:
        from tinyllama.release.gguf import write_gguf  # noqa: PLC0415 - an extra

        write_gguf(part / "gguf", part / "huggingface", name)
    if "ctranslate2" in formats:
        from tinyllama.release.ctranslate2 import write_ctranslate2  # noqa: PLC0415 - an extra

        write_ctranslate2(part / "ctranslate2", part / "huggingface")


def load_formats(part: Path, reference: dict[str, Any], in_transformers: bool) -> str | None:
    """Load each format under `part` once in its engine and compute a few tokens, where the engine is installed.

    `in_transformers` includes the Hugging Face folder, which takes seconds, unless CTranslate2 has converted it.
    Returns the message of the first engine that crashed. Raises RunStoppedError where an engine refuses a file.
    """
    few = {**reference, "texts": [], "continuations": [], "scored": {"ids": reference["scored"]["ids"][:_FEW_TOKENS]}}
    libraries = {"llama_cpp", "ctranslate2"}
    if in_transformers and not (part / "ctranslate2").is_dir():
        libraries.add("transformers")
    crash = None
    for entry in formats_of(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()):
        if entry.engine not in libraries or find_spec(entry.engine) is None:
            continue
        observed = observe(entry.engine, part / entry.path, few)
        if "remedy" in observed:
            crash = crash or crash_line(observed["error"], observed["remedy"])
        elif "error" in observed:
            raise RunStoppedError(
                f"release: {entry.name} does not run in {NAMES[entry.engine]} ({observed['error']}); "
                f"release without it (--formats), or install another version of {NAMES[entry.engine]}"
            )
    return crash
