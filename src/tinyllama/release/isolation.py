"""Native engines in child processes: a crash in one is an observation, not the end of the command.

`engines.py` is the program of the child process. llama.cpp and CTranslate2 never run in this process.
"""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tinyllama.errors import RunStoppedError
from tinyllama.release import engines

NAMES = {
    "transformers": "transformers",
    "transformers-source": "transformers",
    "llama_cpp": "llama.cpp",
    "ctranslate2": "CTranslate2",
}
"""What each engine of `engines.ENGINES` is called in messages."""
_REBUILD = (
    "rebuild it for any x86-64 CPU: "
    "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python "
    "(docs/engines.md)"
)
_OTHER_VERSIONS = "install other versions of torch and transformers, or run this on another machine"
_REMEDIES = {
    "llama_cpp": _REBUILD,
    "ctranslate2": "install another version of ctranslate2, or run this on another machine",
    "transformers": _OTHER_VERSIONS,
    "transformers-source": _OTHER_VERSIONS,
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
    if ended.returncode >= 0:
        return {"error": f"{NAMES[engine]} ended with status {ended.returncode}{_last_line(ended.stderr)}"}
    words, remedy = crash(engine, ended.returncode)
    return {"error": words + _last_line(ended.stderr), "remedy": remedy}


def convert(function: str, *arguments: str) -> None:
    """Run a function of `engines.CONVERSIONS` in a child process.

    Raises RunStoppedError with the engine's last line, or with the signal that ended it and a remedy.
    """
    engine = engines.CONVERSIONS[function][0]
    ended = _run([function, *arguments], b"")
    if ended.returncode < 0:
        words, remedy = crash(engine, ended.returncode)
        if ended.returncode == -signal.SIGKILL:
            remedy = "free some memory or raise its limit, and release again"
        raise RunStoppedError(f"release: {words}{_last_line(ended.stderr)}; {remedy}")
    if ended.returncode:
        raise RunStoppedError(
            f"release: {NAMES[engine]} could not {function}{_last_line(ended.stderr)}; "
            f"release without this format (--formats), or install another version of {NAMES[engine]}"
        )


def crash(engine: str, status: int) -> tuple[str, str]:
    """Return the message and the remedy for an engine that ended by a signal; `status` as `subprocess` gives it."""
    name = signal.Signals(-status).name
    if name == "SIGKILL":  # no fault of the engine's own raises it
        remedy = "free some memory or raise its limit, then `tinyllama verify` the release"
        return f"{NAMES[engine]} was killed (SIGKILL)", remedy
    return f"{NAMES[engine]} crashed ({name}) on this machine", _REMEDIES[engine]


def _run(arguments: list[str], given: bytes) -> subprocess.CompletedProcess[bytes]:
    # -P: this folder has modules of the same names as the libraries
    command = [sys.executable, "-P", engines.__file__, *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=False)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
