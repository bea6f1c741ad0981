"""Stands in for release/engines.py where a test plants a fault: CRASH is ENGINE=SIGNAL or ENGINE=error."""

import os
import sys

from tinyllama.release import engines

name, how = os.environ["CRASH"].split("=")
if sys.argv[1] == name or name == "any":
    print("a line that the engine logged", file=sys.stderr, flush=True)
    if how == "error":
        sys.exit(1)
    os.kill(os.getpid(), int(how))
engines.main(*sys.argv[1:])
