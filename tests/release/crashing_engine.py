"""Replacement for release/engines.py in tests that plant a fault.

ENGINES is the path of engines.py; CRASH is NAME=SIGNAL or NAME=error, for one of its names or `any`.
"""

import os
import runpy
import sys

name, how = os.environ["CRASH"].split("=")
if name in (sys.argv[1], "any"):
    print("a line that the engine logged", file=sys.stderr, flush=True)
    if how == "error":
        sys.exit(1)
    os.kill(os.getpid(), int(how))
runpy.run_path(os.environ["ENGINES"], run_name="__main__")
