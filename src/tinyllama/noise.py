"""Log messages of libraries that mean nothing to a user, dropped by their loggers; everything else passes.

Imports `logging` alone, since the engines' child processes use it too.
"""

import logging


def hush_torchao() -> None:
    """Drop what importing torchao logs; call it before an import of torchao, or of transformers, which imports it.

    torchao tries to load its extensions for all GPUs and Pythons, and registers enums in a way that torch calls old.
    """
    logging.getLogger("torchao").addFilter(_is_no_failed_extension)
    logging.getLogger("torch.utils._pytree").addFilter(_is_no_enum_of_torchao)


def _is_no_failed_extension(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load ")


def _is_no_enum_of_torchao(record: logging.LogRecord) -> bool:
    return "is an Enum subclass and is now natively supported" not in record.getMessage()
