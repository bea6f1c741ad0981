"""Runs `tinyllama generate`, with a KeyboardInterrupt where MODULE is imported: `python interrupted.py MODULE`."""

import sys
from typing import Any


class Finder:
    """A finder of modules that finds none."""

    def __init__(self, interrupted: str) -> None:
        self.interrupted = interrupted

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.interrupted:
            raise KeyboardInterrupt


sys.meta_path.insert(0, Finder(sys.argv[1]))

from tinyllama.__main__ import main  # noqa: E402

sys.argv[1:] = ["generate", "nowhere", "words"]
sys.exit(main())
