"""Silenced log messages of libraries, and the lines that report errors."""

import importlib
import logging
from functools import partial

import pytest

from tinyllama.errors import first_line, run_and_get_exit_status, silence_torchao

ENUM = "<enum 'K'> is an Enum subclass and is now natively supported by torch.compile as an opaque value type."


@pytest.mark.parametrize(
    ("logger", "message", "is_dropped"),
    [
        ("torchao", "Failed to load /x/_C.so: no CUDA", True),
        ("torchao", "float8 is not supported on this device", False),
        ("torchao.float8", "Failed to load the scales", False),
        ("torch.utils._pytree", ENUM, True),
        ("torch.utils._pytree", "<class 'K'> is already registered as pytree node", False),
        ("tinyllama", "Failed to load the checkpoint", False),
    ],
)
def test_only_known_messages_are_silenced(logger: str, message: str, is_dropped: bool) -> None:
    silence_torchao()
    silence_torchao()
    record = logging.LogRecord(logger, logging.WARNING, "", 0, message, None, None)
    assert bool(logging.getLogger(logger).filter(record)) is not is_dropped


def test_error_without_a_message_is_reported_by_its_class() -> None:
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("\nthe cause\nits place")) == "the cause"


def import_and_return(name: str) -> None:
    importlib.import_module(name)


def test_missing_package_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_get_exit_status(partial(import_and_return, "not_installed.inner")) == 2
    assert capsys.readouterr().err == "tinyllama: not_installed: not installed; pip install not_installed\n"


def test_missing_module_of_tinyllama_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_and_get_exit_status(partial(import_and_return, "tinyllama.not_written"))
