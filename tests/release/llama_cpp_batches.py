"""Computes batches of several lengths with a GGUF file: `python llama_cpp_batches.py ENGINES.PY FILE`."""

import runpy
import sys

model = runpy.run_path(sys.argv[1])["open_llama_cpp"](sys.argv[2], n_ctx=128, n_batch=128)
for length in (1, 2, 3, 17, 64):
    model.reset()
    model.eval([1, *range(300, 299 + length)])
    print(length, flush=True)
