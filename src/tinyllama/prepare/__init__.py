"""Conversion of raw text to a token store on any number of workers: reading, cleaning and tokenization."""

import os

# The default of pyarrow 26, mimalloc, keeps freed memory: a process that had read a parquet page of 480 MB still had
# 770 MB, and 100 MB with malloc. pyarrow reads the variable when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
