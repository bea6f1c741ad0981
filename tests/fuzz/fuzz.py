"""Coverage-guided search for inputs that break a property test (libFuzzer, through atheris).

`python -m tests.fuzz.fuzz MODULE.TEST [SECONDS]` fuzzes a test; without arguments, the program prints all tests.
hypothesis builds the arguments of a test from the bytes of libFuzzer. The corpus is stored in build/fuzz/MODULE.TEST,
with failing inputs as `crash-…`, `timeout-…` or `oom-…`. If SECONDS is such a file, only this file is tried.
"""

import importlib
import logging
import os
import pkgutil
import random
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

SECONDS_PER_INPUT, MEGABYTES, MAX_BYTES = 20, 4096, 8192


def names_of_targets() -> list[str]:
    """Return `MODULE.TEST` of every property test in this folder."""
    modules = [importlib.import_module(f"tests.fuzz.{path.stem}") for path in Path(__file__).parent.glob("test_*.py")]
    return [
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, test in vars(module).items()
        if getattr(test, "is_hypothesis_test", False)
    ]


def fuzz(target: str, seconds: str = "60") -> None:
    """Fuzz one test for a number of seconds, or try one file."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["tinyllama", "yaml"]):
        import yaml  # noqa: F401 - parses recipes

        import tinyllama

        for module in pkgutil.walk_packages(tinyllama.__path__, "tinyllama."):
            if not module.name.endswith(("__main__", "_sink", "engines")):
                importlib.import_module(module.name)
    name, _, test = target.partition(".")
    check = getattr(importlib.import_module(f"tests.fuzz.{name}"), test).hypothesis.fuzz_one_input
    folder = Path("build/fuzz") / target
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(24):  # hypothesis rejects inputs that are too short
        (corpus / f"random-{number}").write_bytes(random.Random(number).randbytes(1 << (6 + number % 6)))
    limits = [f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={MAX_BYTES}", "-len_control=0"]
    rest = [f"-max_total_time={seconds}", str(corpus)] if seconds.isdigit() else [seconds]
    logging.disable()
    atheris.Setup([target, *limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", *rest], check)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(*names_of_targets())
    else:
        fuzz(*sys.argv[1:])
