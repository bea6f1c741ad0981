"""llama.cpp and CTranslate2 for the tests: each call runs in a child process, so a crash fails one test.

Only functions of this module that run in a child process may import these libraries.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tests.train.launch import FORK_SERVER

P = ParamSpec("P")
R = TypeVar("R")


def run_in_child(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call a function in a child process; raise its exception, or BrokenProcessPool if the process crashes."""
    with ProcessPoolExecutor(1, mp_context=FORK_SERVER) as pool:
        try:
            return pool.submit(function, *arguments, **options).result()
        except BaseException:  # such as a test's timeout; otherwise the pool would wait for its process
            for child in multiprocessing.active_children():
                child.kill()
            raise


def ids_in_llama_cpp(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids that llama.cpp's tokenizer gives the texts."""
    from tinyllama.release.engines import open_llama_cpp

    model = open_llama_cpp(str(path), vocab_only=True)
    return [model.tokenize(text.encode()) for text in texts]


def compute_batches(path: Path, lengths: Sequence[int]) -> None:
    """Compute one batch of each length with llama.cpp."""
    from tinyllama.release.engines import open_llama_cpp

    model = open_llama_cpp(str(path), n_ctx=128, n_batch=128)
    for length in lengths:
        model.reset()
        model.eval([1, *range(300, 299 + length)])


def compute_type(folder: Path) -> str:
    """Return the type that a CTranslate2 folder is computed in."""
    import ctranslate2

    return str(ctranslate2.Generator(str(folder)).compute_type)


def logits_in_ctranslate2(folder: Path, ids: list[int]) -> Any:
    """Return float32 [1, len(ids), V]."""
    import ctranslate2
    import numpy as np

    return np.array(ctranslate2.Generator(str(folder)).forward_batch([ids], return_log_probs=False))
