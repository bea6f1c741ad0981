"""The formats of a release besides Hugging Face's, each made from the Hugging Face folder.

The libraries that write and run them are the extra `formats`; what is missing is said before anything is done.
"""

from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path

from tinyllama.errors import InputError

LIBRARIES = {
    "huggingface": ("transformers",),
    "gguf": ("gguf", "llama_cpp"),
    "ctranslate2": ("ctranslate2", "transformers"),
}
"""What each format is written with, and what runs it in `tinyllama verify`."""


def check_formats(formats: Collection[str]) -> None:
    """Raise InputError, naming the extra, where a library is missing that writes one of the formats."""
    check_libraries(library for name in formats if name != "huggingface" for library in LIBRARIES[name])


def check_libraries(names: Iterable[str]) -> None:
    """Raise InputError, naming the extra, where one of these libraries is not installed."""
    missing = next((name for name in names if find_spec(name) is None), None)
    if missing:
        raise InputError(f'{missing} is not installed: pip install "tinyllama[formats]"')


def write_formats(part: Path, formats: Collection[str], name: str) -> None:
    """Write `part/gguf` and `part/ctranslate2`, where they are among the formats, from `part/huggingface`.

    Files of GGUF are called after `name`. Raises InputError for a tokenizer that a format has no place for.
    """
    if "gguf" in formats:
        from tinyllama.release.gguf import write_gguf  # noqa: PLC0415 - an extra

        write_gguf(part / "gguf", part / "huggingface", name)
    if "ctranslate2" in formats:
        from tinyllama.release.ctranslate2 import write_ctranslate2  # noqa: PLC0415 - an extra

        write_ctranslate2(part / "ctranslate2", part / "huggingface")
