"""Coverage-guided search for inputs that break a property (libFuzzer, through atheris).

`python -m tests.fuzz.fuzz TARGET [SECONDS]`. The corpus starts from real files and is stored in build/fuzz/TARGET/,
with failing inputs as `crash-…`, `timeout-…` or `oom-…`. Given such a file instead of SECONDS, it tries only that file.
"""

import hashlib
import importlib
import logging
import os
import pkgutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["tinyllama", "yaml"]):
    import yaml  # noqa: F401 - parses recipes

    import tinyllama

    for module in pkgutil.walk_packages(tinyllama.__path__, "tinyllama."):
        if not module.name.endswith(("__main__", "_sink", "engines")):
            importlib.import_module(module.name)

from tests.fuzz.targets import TARGETS

BUILD = Path(__file__).parents[2] / "build/fuzz"
SECONDS_PER_INPUT, MEGABYTES = 20, 4096


def main(name: str, seconds: str = "60") -> None:
    """Fuzz one target for a number of seconds, or try one file."""
    target = TARGETS[name]
    folder = BUILD / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)
    limits = [
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-max_len={target.max_bytes}",
        "-len_control=0",
    ]
    rest = [f"-max_total_time={seconds}", str(corpus)] if seconds.isdigit() else [seconds]
    logging.disable()
    atheris.Setup([name, *limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", *rest], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
