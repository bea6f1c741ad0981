"""Program that prints what llama.cpp logs while this package loads a file: `llama_cpp_buffers.py FILE`."""

import sys

from tinyllama.release.engines import open_llama_cpp

model = open_llama_cpp(sys.argv[1], verbose=True)
print("extra buffers:", model.model_params.use_extra_bufts, file=sys.stderr)
