"""Only known log messages of libraries are silenced."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

_LOG = "import logging; logging.getLogger({logger!r}).warning({message!r})"
_ENUM = "<enum 'K'> is an Enum subclass and is now natively supported by torch.compile as an opaque value type."


def said(program: str) -> str:
    """Return what a process writes to standard error."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return done.stderr


@pytest.mark.parametrize(
    ("logger", "message", "is_dropped"),
    [
        ("torchao", "Failed to load /x/_C.so: no CUDA", True),
        ("torchao", "float8 is not supported on this device", False),
        ("torchao.float8", "Failed to load the scales", False),
        ("torch.utils._pytree", _ENUM, True),
        ("torch.utils._pytree", "<class 'K'> is already registered as pytree node", False),
        ("tinyllama", "Failed to load the checkpoint", False),
    ],
)
def test_only_known_messages_are_silenced(logger: str, message: str, is_dropped: bool) -> None:
    hush = "from tinyllama.errors import silence_torchao; silence_torchao(); silence_torchao(); "
    log = _LOG.format(logger=logger, message=message)
    assert said(log) == f"{message}\n"
    assert said(hush + log) == ("" if is_dropped else f"{message}\n")


@pytest.mark.parametrize("library", ["torchao.quantization", "torchao.float8"])
def test_importing_torchao_prints_nothing(library: str) -> None:
    pytest.importorskip("torchao")
    assert said(f"from tinyllama.errors import silence_torchao; silence_torchao(); import {library}") == ""
