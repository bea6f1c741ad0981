"""Replacement for the program release/engines.py in tests of crashes.

ENGINES is the path of engines.py; CRASH is NAME=SIGNAL or NAME=error, for one of its names or `any`.
"""

import os
import runpy
import sys

engine = next(word for word in sys.argv[1:] if not word.startswith("--"))
name, how = os.environ["CRASH"].split("=")
if name in (engine, "any"):
    print("a line that the engine logged", file=sys.stderr, flush=True)
    if how == "error":
        sys.exit(1)
    os.kill(os.getpid(), int(how))
runpy.run_path(os.environ["ENGINES"], run_name="__main__")
