"""Looks for inputs that break a property, guided by the branches that each input reaches (libFuzzer, atheris).

`python -m tests.fuzz.fuzz TARGET [SECONDS]`. Its corpus starts from real files and stays under build/fuzz/TARGET/, with
what broke as `crash-…`, `timeout-…` or `oom-…`; such a file given instead of SECONDS is tried alone.
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
    import yaml  # noqa: F401 - a reader of recipes

    import tinyllama

    for module in pkgutil.walk_packages(tinyllama.__path__, "tinyllama."):
        if not module.name.endswith(("__main__", "_sink", "engines")):
            importlib.import_module(module.name)

from tests.fuzz.targets import TARGETS

BUILD = Path(__file__).parents[2] / "build/fuzz"
SECONDS_AN_INPUT, MEGABYTES = 20, 4096


def main(name: str, seconds: str = "60") -> None:
    """Fuzz one target for so long, or try one file."""
    target = TARGETS[name]
    folder = BUILD / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:20]).write_bytes(seed)
    limits = [
        f"-timeout={SECONDS_AN_INPUT}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-max_len={target.longest}",
        "-len_control=0",
    ]
    rest = [f"-max_total_time={seconds}", str(corpus)] if seconds.isdigit() else [seconds]
    logging.disable()
    atheris.Setup([name, *limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", *rest], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
