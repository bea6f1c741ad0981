"""Entry point of the commands `tinyllama` and `python -m tinyllama`."""

import sys


def main() -> int:
    """Run the command line and return its exit status. Ctrl-C during the imports prints one line, no traceback."""
    try:
        from tinyllama import cli  # noqa: PLC0415

        return cli.main()
    except KeyboardInterrupt:
        print("tinyllama: interrupted", file=sys.stderr)  # noqa: T201
        return 130


if __name__ == "__main__":
    sys.exit(main())
