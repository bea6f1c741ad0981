"""Starts an engine that waits for its input, and prints its process number: `python engine_starter.py ENGINES.PY`."""

import subprocess
import sys

engine = subprocess.Popen([sys.executable, "-P", sys.argv[1], "llama_cpp", "no.gguf", "no.json"])
print(engine.pid, flush=True)
engine.wait()
