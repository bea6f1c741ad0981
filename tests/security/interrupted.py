"""Runs `tinyllama generate` with a KeyboardInterrupt at the import of MODULE: `python interrupted.py MODULE`."""

import sys
from typing import Any


class Finder:
    """A module finder that finds nothing."""

    def __init__(self, interrupted: str) -> None:
        self.interrupted = interrupted

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.interrupted:
            raise KeyboardInterrupt


sys.meta_path.insert(0, Finder(sys.argv[1]))

from tinyllama.__main__ import main  # noqa: E402

sys.argv[1:] = ["generate", "nowhere", "words"]
sys.exit(main())
