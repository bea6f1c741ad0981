"""Training: the loop and the modules that it calls."""

from tinyllama.processes import use_expandable_segments, use_private_compile_cache

use_expandable_segments()
use_private_compile_cache()  # before any module of this package imports torch
