"""Prints what llama.cpp logs while it loads a GGUF file: `python llama_cpp_buffers.py FILE (wrapper|default)`."""

import sys

from llama_cpp import Llama

from tinyllama.release.engines import open_llama_cpp

path, how = sys.argv[1:]
model = open_llama_cpp(path, verbose=True) if how == "wrapper" else Llama(path, verbose=True)
print("extra buffers:", model.model_params.use_extra_bufts, file=sys.stderr)
