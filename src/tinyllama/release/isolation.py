"""Native engines in child processes: a crash in one is an observation, not the end of the command.

`engines.py` is the program of the child process. llama.cpp and CTranslate2 never run in this process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tinyllama.errors import RunStoppedError
from tinyllama.release import engines

NAMES = {"transformers": "transformers", "llama_cpp": "llama.cpp", "ctranslate2": "CTranslate2"}
"""Name of each library in messages."""
_REMEDIES = {
    "llama_cpp": "rebuild it for any x86-64 CPU: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall "
    "--no-cache-dir --no-deps llama-cpp-python (docs/engines.md)",
    "ctranslate2": "install another version of ctranslate2, or run this on another machine",
    "transformers": "install other versions of torch and transformers, or run this on another machine",
}


def observe(engine: str, path: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Return what an engine says of a release's format, see `engines`.

    `error` holds the message where the engine failed; `remedy` is there too where it ended by a signal, which is no
    evidence against the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "observed.json"
        ended = _run([engine, str(path), str(out)], json.dumps(reference).encode())
        if out.is_file():
            observed: dict[str, Any] = json.loads(out.read_text())
            return observed
    library = engine.removesuffix("-source")
    if ended.returncode >= 0:
        return {"error": f"{NAMES[library]} ended with status {ended.returncode}{_last_line(ended.stderr)}"}
    words, remedy = crash(library, ended.returncode)
    return {"error": words + _last_line(ended.stderr), "remedy": remedy}


def convert(library: str, function: str, *arguments: str) -> None:
    """Run a function of `engines.CONVERSIONS`, which uses this library, in a child process.

    Raises RunStoppedError with the library's last line, or with the signal that ended it and a remedy.
    """
    ended = _run([function, *arguments], b"")
    if ended.returncode < 0:
        words, remedy = crash(library, ended.returncode)
        if ended.returncode == -signal.SIGKILL:
            remedy = "free some memory or raise its limit, and release again"
        raise RunStoppedError(f"release: {words}{_last_line(ended.stderr)}; {remedy}")
    if ended.returncode:
        raise RunStoppedError(
            f"release: {NAMES[library]} could not {function}{_last_line(ended.stderr)}; "
            f"release without this format (--formats), or install another version of {NAMES[library]}"
        )


def crash(library: str, status: int) -> tuple[str, str]:
    """Return the message and the remedy for a library that ended by a signal; `status` is subprocess's `returncode`."""
    name = signal.Signals(-status).name
    if name == "SIGKILL":  # sent from outside, such as by the kernel where memory runs out
        remedy = "free some memory or raise its limit, then `tinyllama verify` the release"
        return f"{NAMES[library]} was killed (SIGKILL)", remedy
    return f"{NAMES[library]} crashed ({name}) on this machine", _REMEDIES[library]


def crash_line(error: str, remedy: str) -> str:
    """Return the line that reports a crash which `observe` found."""
    return f"{error}, which is no evidence against the file; {remedy}"


def _run(arguments: list[str], given: bytes) -> subprocess.CompletedProcess[bytes]:
    # -P: this folder has modules of the same names as the libraries
    command = [sys.executable, "-P", engines.__file__, f"{engines.PARENT}{os.getpid()}", *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=False)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
