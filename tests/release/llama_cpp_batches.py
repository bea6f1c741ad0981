"""Computes batches of several lengths with a GGUF file and prints each length: `python llama_cpp_batches.py FILE`."""

import sys

from tinyllama.release.engines import open_llama_cpp

model = open_llama_cpp(sys.argv[1], n_ctx=128, n_batch=128)
for length in (1, 2, 3, 17, 64):
    model.reset()
    model.eval([1, *range(300, 299 + length)])
    print(length, flush=True)
