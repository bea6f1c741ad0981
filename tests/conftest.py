"""Fixtures and helpers of all tests: no hub access, and a small data set that is prepared once."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On a busy machine, two threads take a hundred times as long as one for small matrices.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from filelock import FileLock
from tests.fork_server import run_in_fork

from tinyllama.prepare.corpus import EMBEDDED_CORPUS_MANIFEST, STAGING_DIR, CorpusSizes, write_corpus
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.tasks import Job, run_task
from tinyllama.progress import set_quiet
from tinyllama.recipe import Recipe
from tinyllama.release import engines
from tinyllama.tokenizer.training import train_tokenizer, training_text

MAY_CRASH = {"llama_cpp", "ctranslate2"}
"""Libraries whose native code may crash; tests run them in child processes: see tests/release/native.py."""
REPORTED: set[str] = set()
"""Those libraries that a test failed for already."""


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_handlecrashitem(report: Any) -> None:
    """Mark the report of a crash, for the next hook."""
    report.is_crash = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    """End the run when a test process crashes; xdist would let the other processes finish their files."""
    if getattr(report, "is_crash", False):
        pytest.exit(report.longrepr, returncode=1)


@pytest.fixture(autouse=True)
def nothing_that_may_crash() -> Iterator[None]:
    """Fail a test that imports one of MAY_CRASH into the test process."""
    yield
    loaded = MAY_CRASH & sys.modules.keys() - REPORTED
    REPORTED.update(loaded)
    assert not loaded, "run it in a child process: see tests/release/native.py"


@pytest.fixture(autouse=True)
def shown_progress() -> None:
    """Show progress, which a previous test or fixture of this process may have hidden with `--quiet`."""
    set_quiet(False)


@pytest.fixture(autouse=True, scope="module")
def compiled_functions() -> None:
    """Forget compiled functions, since files of tests in one process would share torch's limit of recompilations."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def quick_engines() -> Iterator[None]:
    """Fork the engines' processes from a server that has imported transformers: see tests/fork_server.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "_run", run_in_fork)
        yield


def python_sources(count: int) -> list[str]:
    """Return the first `count` modules of the standard library as text."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:count]]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def small_recipe(folder: Path) -> dict[str, Any]:
    """Return a recipe that trains in seconds: two sources, 40 steps."""
    return {
        "name": "small",
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "store": str(folder / "store"),
            "workers": 1,
            "sources": {
                "modules": {"format": "jsonl", "path": str(folder / "raw/modules"), "weight": 0.7},
                "lines": {"format": "jsonl", "path": str(folder / "raw/lines"), "weight": 0.3},
            },
            "validation_fraction": 0.1,
        },
        "model": {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context_length": 128},
        "train": {
            "tokens": 40 * 6 * 64,
            "sequence_length": 64,
            "batch_sequences": 6,
            "micro_batch_sequences": 2,
            "precision": "fp32",
            "compile": False,
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": 5, "final_learning_rate": 3e-4},
            "validate_every_steps": 20,
            "validation_sequences": 20,
            "sample_prompts": [],
        },
        "checkpoint": {"every_steps": 10, "keep": 2},
    }


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with raw text, a tokenizer, a prepared store and `recipe.yaml`; tests do not change it."""
    folder = tmp_path_factory.mktemp("small")
    modules = python_sources(40)
    write_jsonl(folder / "raw/modules/a.jsonl", modules[:20])
    write_jsonl(folder / "raw/modules/b.jsonl", modules[20:])
    write_jsonl(
        folder / "raw/lines/a.jsonl", [line for text in modules for line in text.splitlines() if line.strip()][:4000]
    )
    train_tokenizer(training_text(modules), 600).save(folder / "tokenizer", 128)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(folder), sort_keys=False))
    build_store(Recipe.load(folder / "recipe.yaml"))
    return folder


@pytest.fixture(scope="session")
def embedded_corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, CorpusSizes]:
    """Return the embedded corpus, the same corpus written by another process, and the first one's report.

    Tests do not change them. The first of several test processes makes them for all.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "embedded"
    shared.mkdir(exist_ok=True)
    directory, second, report = shared / "raw", shared / "again", shared / "report"
    with FileLock(shared / "lock"):
        if not report.is_file():
            for folder in (directory, second):  # of a failed attempt
                shutil.rmtree(folder, ignore_errors=True)
            report.write_bytes(pickle.dumps(write_corpora(directory, second)))
    return directory, second, pickle.loads(report.read_bytes())


def write_corpora(directory: Path, second: Path) -> CorpusSizes:
    """Write the embedded corpus in two processes at once, one of them over an older corpus; return one report."""
    write_older_corpus(second)
    command = [sys.executable, "-m", "tinyllama", "corpus", "."]
    elsewhere = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    with subprocess.Popen(command, cwd=second, env=elsewhere, stdout=subprocess.DEVNULL) as process:
        report = write_corpus(directory)
    assert process.returncode == 0
    return report


def write_older_corpus(directory: Path) -> None:
    """Write an older corpus of one other file, and the files of a killed run."""
    stale = directory / "starcoderdata" / "python" / "train-00000-of-00009.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an older corpus")
    name = stale.relative_to(directory).as_posix()
    files = {name: hashlib.sha256(b"of an older corpus").hexdigest()}
    (directory / EMBEDDED_CORPUS_MANIFEST).write_text(json.dumps({"files": files}))
    (directory / STAGING_DIR / "slimpajama").mkdir(parents=True)
    (directory / STAGING_DIR / "slimpajama" / "half.jsonl.zst").write_bytes(b"half")


@contextmanager
def locked_by_another_process(folder: Path, lock: str = "lock") -> Iterator[None]:
    """Let another process hold the lock `folder/lock` during the block."""
    command = [sys.executable, str(Path(__file__).with_name("lock_holder.py")), str(folder), lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate()


def cannot_run(reason: str) -> NoReturn:
    """Skip the test. In CI, which has everything that the tests need, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def interrupt(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Interrupt `prepare` after `after` tasks."""
    left = iter(range(after))

    def run_or_interrupt(job: Job, stage: str, rank: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        run_task(job, stage, rank)

    with monkeypatch.context() as patch:
        patch.setattr("tinyllama.prepare.executors.run_task", run_or_interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_store(recipe)
