"""Filters for log messages of libraries that mean nothing to a user; all other messages pass.

Imports `logging` alone, since the engines' child processes use it too.
"""

import logging


def hush_torchao() -> None:
    """Drop the messages that torchao logs on import; call this before importing torchao or transformers.

    transformers imports torchao. torchao tries to load its extensions for all GPUs and Python versions, and registers
    enums in a way that torch warns about.
    """
    logging.getLogger("torchao").addFilter(_is_no_failed_extension)
    logging.getLogger("torch.utils._pytree").addFilter(_is_no_enum_of_torchao)


def _is_no_failed_extension(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load ")


def _is_no_enum_of_torchao(record: logging.LogRecord) -> bool:
    return "is an Enum subclass and is now natively supported" not in record.getMessage()
