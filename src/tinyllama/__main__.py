"""Entry point of the commands `tinyllama` and `python -m tinyllama`."""

import contextlib
import os
import sys

# ruff: noqa: PLC0415


def main() -> int:
    """Run the command line and return its exit status.

    After Ctrl-C, also during the imports, print one line without a traceback and end the process immediately.
    """
    try:
        from tinyllama.errors import run_and_get_exit_status

        status = run_and_get_exit_status(_run_command)
    except KeyboardInterrupt:
        print("tinyllama: interrupted", file=sys.stderr)  # noqa: T201
        status = 130
    if status == 130:  # do not wait for threads, for example of a checkpoint that is being written
        with contextlib.suppress(OSError):  # the reader of the output has ended too
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    return status


def _run_command() -> int:
    """Run the command line. Raises InputError if it lacks a package that training in Python does not need."""
    from tinyllama.errors import InputError

    try:
        from tinyllama import cli
    except ModuleNotFoundError as error:
        if (error.name or "tinyllama").startswith("tinyllama"):
            raise
        remedy = f"pip install {error.name}, or train in Python: tinyllama.train_model(tinyllama.Recipe.load('FILE'))"
        raise InputError(f"command line: {error.name} is not installed; {remedy}") from None
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
