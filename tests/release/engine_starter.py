"""Starts an engine that waits for its input and prints its process id: `python engine_starter.py ENGINES.PY`."""

import os
import subprocess
import sys

command = [sys.executable, "-P", sys.argv[1], f"--parent={os.getpid()}", "llama_cpp", "no.gguf", os.devnull]
engine = subprocess.Popen(command)
print(engine.pid, flush=True)
engine.wait()
