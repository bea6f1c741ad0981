"""Entry point of the commands `tinyllama` and `python -m tinyllama`."""

import sys

# ruff: noqa: PLC0415


def main() -> int:
    """Run the command line and return its exit status. Ctrl-C during the imports prints one line, no traceback."""
    try:
        from tinyllama.errors import run_and_get_exit_status

        return run_and_get_exit_status(_run_command)
    except KeyboardInterrupt:
        print("tinyllama: interrupted", file=sys.stderr)  # noqa: T201
        return 130


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
