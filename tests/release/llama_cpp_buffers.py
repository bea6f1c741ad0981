"""Prints what llama.cpp logs while it loads a file: `python llama_cpp_buffers.py ENGINES.PY FILE (wrapper|default)`."""

import runpy
import sys

from llama_cpp import Llama

engines, path, how = sys.argv[1:]
load = runpy.run_path(engines)["open_llama_cpp"] if how == "wrapper" else Llama
model = load(path, verbose=True)
print("extra buffers:", model.model_params.use_extra_bufts, file=sys.stderr)
