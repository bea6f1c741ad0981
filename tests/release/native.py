"""llama.cpp and CTranslate2 for the tests: each call in a process of its own, so that a crash fails one test.

The processes are forked from one that has imported the libraries, which takes longer than most calls. Only functions
of this module that run there may import them.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tinyllama.release.gguf", "tinyllama.release.ctranslate2"])


def apart(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call a function in a process of its own, in this working folder; its error is raised here.

    BrokenProcessPool where the process crashes.
    """
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=os.chdir, initargs=(Path.cwd(),)) as pool:
        try:
            return pool.submit(function, *arguments, **options).result()
        except BaseException:  # such as a test's timeout, after which the pool would wait for its process
            for child in multiprocessing.active_children():
                child.kill()
            raise


def write_gguf(folder: Path, source: Path, fault: str | None = None) -> None:
    """Write a Hugging Face folder's GGUF files, the converter with one of the faults below."""
    import gguf

    from tinyllama.release import gguf as converter

    add, names = gguf.GGUFWriter.add_add_bos_token, converter._names
    match fault:
        case "rope":
            converter.rotated_by_neighbours = lambda weight, heads: weight
        case "no start":
            gguf.GGUFWriter.add_add_bos_token = lambda writer, _: add(writer, False)
        case "swapped":
            converter._names = lambda *there: {_swap(theirs): ours for theirs, ours in names(*there).items()}
    converter.write_gguf(folder, source, "small")


def _swap(name: str) -> str:
    return re.sub(r"gate|up", lambda found: {"gate": "up", "up": "gate"}[found[0]], name)


def rotated_rows(count: int, heads: int) -> list[float]:
    """Where the converter puts rows 0, 1, 2 … of a query."""
    import torch

    from tinyllama.release.gguf import rotated_by_neighbours

    rows: list[float] = rotated_by_neighbours(torch.arange(float(count))[:, None], heads).flatten().tolist()
    return rows


def ids_in_llama_cpp(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that llama.cpp's tokenizer gives texts."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode()) for text in texts]


def compute_type(folder: Path) -> str:
    """What a CTranslate2 folder is computed in."""
    import ctranslate2

    return str(ctranslate2.Generator(str(folder)).compute_type)


def logits_in_ctranslate2(folder: Path, ids: list[int]) -> Any:
    """float32 [1, len(ids), V]."""
    import ctranslate2
    import numpy as np

    return np.array(ctranslate2.Generator(str(folder)).forward_batch([ids], return_log_probs=False))
