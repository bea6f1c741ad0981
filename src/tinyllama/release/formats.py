"""The formats of a release: Hugging Face, and its conversions to GGUF and CTranslate2.

The extra `formats` installs the libraries that write and run the formats. This module imports neither these libraries
nor torch.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError, RunStoppedError
from tinyllama.release.engines import ENGINE_NAMES, crash_line, run_conversion, run_engine
from tinyllama.tokenizer import SAVED_FILES

LIBRARIES = {
    "huggingface": ("transformers",),
    "gguf": ("gguf", "llama_cpp"),
    "ctranslate2": ("ctranslate2", "transformers"),
}
"""Libraries that write each format and run the format in `tinyllama verify`."""
_WRITER_LIBRARIES = ("huggingface_hub", "matplotlib", "pyarrow")
"""Requirements of tinyllama that releases need and that a machine that only trains may lack."""
# GGUF's Q8_0 stores 32 weights in 34 bytes. The size of Q4_K_M was measured with a model of 1.1B parameters
# (benchmarks/release_1b.py).
FORMAT_BYTES = {"huggingface": 2.0, "gguf": 2.0 + 34 / 32 + 0.607, "ctranslate2": 1.0 + 4.0}
"""Bytes per parameter of each format."""
# With `int8` instead of `int8_float32`, all operations except matrix products would be in bf16, not in float32.
_CTRANSLATE2_TYPES = {"float32": "float32", "int8": "int8_float32"}
CHAT_TEMPLATE = "chat_template.jinja"
"""Name of the file in which transformers 5 looks for a chat template."""
_SMOKE_TEST_TOKENS = 8
"""Number of tokens per smoke test: enough for matrix products, whose code in the engines depends on the CPU type."""


def release_bytes(formats: Iterable[str], parameters: int) -> int:
    """Return the size in bytes of a release in `formats`; Hugging Face is always included."""
    return round(parameters * sum(FORMAT_BYTES[name] for name in {"huggingface", *formats}))


def check_format_libraries(formats: Collection[str]) -> None:
    """Check that the libraries that write a release in the formats are installed. Raises InputError otherwise."""
    others = (library for name in formats if name != "huggingface" for library in LIBRARIES[name])
    require_libraries((*_WRITER_LIBRARIES, *others))


def require_libraries(names: Iterable[str]) -> None:
    """Check that libraries are installed; if not, raise an InputError that names the extra to install."""
    missing = next((name for name in names if find_spec(name) is None), None)
    if missing:
        raise InputError(f'formats: {missing} is not installed; pip install "tinyllama[formats]"')


@dataclass(frozen=True)
class ReleasedFormat:
    """One format in a release."""

    name: str
    """Name in the table of checks, such as `gguf Q8_0`."""
    engine: str
    path: str
    """Path that the engine loads, relative to the release's folder."""

    @property
    def kind(self) -> str:
        """Name of the format in the recipe's `release.formats`."""
        return self.name.split()[0]


def list_formats(files: Iterable[str]) -> list[ReleasedFormat]:
    """Return the formats that a release's files belong to, whether or not the files still exist."""
    names = list(files)
    ggufs = {Path(name).stem.rpartition("-")[2]: name for name in names if name.startswith("gguf/")}
    ctranslate2 = sorted({Path(name).parts[1] for name in names if name.startswith("ctranslate2/")})
    hugging_face = {Path(name).parts[0] for name in names} & {"huggingface"}
    return [
        *(ReleasedFormat(name, "transformers", name) for name in hugging_face),
        *(
            ReleasedFormat(f"gguf {kind}", "llama_cpp", ggufs[kind])
            for kind in ("F16", "Q8_0", "Q4_K_M")
            if kind in ggufs
        ),
        *(ReleasedFormat(f"ctranslate2 {kind}", "ctranslate2", f"ctranslate2/{kind}") for kind in ctranslate2),
    ]


def write_formats(folder: Path, formats: Collection[str], name: str) -> None:
    """Write `folder/gguf` and `folder/ctranslate2` from `folder/huggingface`, if they are among `formats`.

    The names of GGUF files begin with `name`. Raises InputError if a format does not support the tokenizer or a weight.
    Raises RunStoppedError if the library that writes a format fails or crashes.
    """
    if "gguf" in formats:
        from tinyllama.release.gguf import write_gguf  # noqa: PLC0415 - an extra

        write_gguf(folder / "gguf", folder / "huggingface", name)
    if "ctranslate2" in formats:
        write_ctranslate2(folder / "ctranslate2", folder / "huggingface")


def write_ctranslate2(folder: Path, source: Path) -> None:
    """Write `folder/float32` and `folder/int8` (with one scale per row) from a Hugging Face Llama's folder.

    CTranslate2's own converter runs in one child process per type. The converter processes one matrix at a time, so
    memory holds the model only once. Both folders get the tokenizer's files, since CTranslate2 reads tokens, not text.
    Raises RunStoppedError if the converter fails or crashes.
    """
    folder.mkdir(parents=True)
    files = [name for name in SAVED_FILES if (source / name).is_file()]
    for name, kind in _CTRANSLATE2_TYPES.items():
        run_conversion("ctranslate2", "convert", str(source), str(folder / name), kind, *files)


def smoke_test(folder: Path, reference: dict[str, Any], in_transformers: bool) -> str | None:
    """Run each format in `folder` on a few tokens in the format's engine, if the engine is installed.

    If `in_transformers` is true, the Hugging Face folder also runs in transformers, which takes seconds. It does not
    run if `folder/ctranslate2` exists, because the conversion to CTranslate2 has already loaded it in transformers.
    Returns the message of the first engine that crashed, or None. Raises RunStoppedError if an engine rejects a file.
    """
    scored = {"ids": reference["scored"]["ids"][:_SMOKE_TEST_TOKENS]}
    short_reference = {**reference, "texts": [], "continuations": [], "scored": scored}
    engines = {"llama_cpp", "ctranslate2"}
    if in_transformers and not (folder / "ctranslate2").is_dir():
        engines.add("transformers")
    crash = None
    for released in list_formats(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        if released.engine not in engines or find_spec(released.engine) is None:
            continue
        output = run_engine(released.engine, folder / released.path, short_reference)
        if "remedy" in output:
            crash = crash or crash_line(output["error"], output["remedy"])
        elif "error" in output:
            engine = ENGINE_NAMES[released.engine]
            raise RunStoppedError(
                f"release: {released.name} does not run in {engine} ({output['error']}); release without this format "
                f"(--formats), or install another version of {engine}"
            )
    return crash
