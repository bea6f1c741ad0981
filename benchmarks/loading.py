"""Comparison of `batches`, litdata and a plain memory map as readers of training data, and the cost of 1e12 tokens.

The script writes random tokens as a token store of two sources, as litdata's chunks and as one flat file. Then the
three programs read shuffled batches of 8 x 2049 as int64 in turns, in this process, from a warm page cache. Finally, a
separate process opens a sparse store of 1e12 tokens, with manifests as long as real ones, and calls `sequences` for the
1,024 rows of the first step and of a late step. Linux only.

    python benchmarks/loading.py --megatokens 200
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import OURS, Measure, Program, options, seconds_of, take_turns, write_measures
from peers import make_peer, packages_of, version_of

from tinyllama.data.batches import batches
from tinyllama.data.order import sequences
from tinyllama.data.store import FORMAT_VERSION, TokenStore
from tinyllama.recipe import Recipe

SHARES = {"slimpajama": 0.7, "starcoderdata": 0.3}
ROWS, LENGTH = 8, 2048
VOCABULARY = 32_000
TURN_BATCHES = 512
SHA256 = "0123456789abcdef" * 4
# SlimPajama's and Starcoderdata's 59,252 files, four per shard
SPARSE_SHARDS, SPARSE_TOKENS, SPARSE_INPUTS = 14_900, 68_000_000, 59_252

OPEN = """
import sys, time
begun = time.perf_counter()
from tinyllama.data.store import TokenStore
imported = time.perf_counter()
store = TokenStore.open(sys.argv[1])
print(imported - begun, time.perf_counter() - imported, sum(split.num_tokens for split in store.splits.values()))
print(open("/proc/self/status").read())
"""


def main() -> None:
    """Run the measurements and print the results."""
    parser = options(__doc__, rounds=15)
    parser.add_argument("--megatokens", type=float, default=200, help="random tokens to read (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    python = make_peer(arguments.work.resolve(), "litdata")
    sys.path.append(str(packages_of(python)))  # litdata is installed there without its dependencies
    with tempfile.TemporaryDirectory() as folder:
        num_tokens = int(arguments.megatokens * 1e6)
        measure = compare_readers(Path(folder), num_tokens, arguments.rounds, version_of(python, "litdata"))
        open_a_trillion(Path(folder) / "sparse")
    write_measures(arguments.json, [measure])


def compare_readers(folder: Path, num_tokens: int, rounds: int, litdata: str) -> Measure:
    """Measure the readers in turns."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, num_tokens, dtype=np.uint16)
    tokens.tofile(folder / "flat")
    readers = {
        OURS: read_ours(write_random(folder / "store", tokens)),
        "plain memmap": read_plainly(folder / "flat"),
        "litdata": read_litdata(folder / "litdata", folder / "flat"),
    }
    programs = {name: partial(read_batches, reader) for name, reader in readers.items()}
    for program in programs.values():  # warm-up
        program()
        program()
    seconds = take_turns(programs, rounds)
    settings = {
        OURS: "`tinyllama.data.batches` of two sources, with order, mixture and prefetching",
        "plain memmap": "rows of one flat file in a random order from numpy, without mixture, resuming or checks",
        "litdata": "StreamingDataset, TokensLoader, shuffle, drop_last, without worker processes, which are slower "
        "here",
    }
    versions = {OURS: version(OURS), "plain memmap": f"numpy {np.__version__}", "litdata": litdata}
    megatokens = TURN_BATCHES * ROWS * LENGTH / 1e6
    return Measure(
        section="loading",
        name=f"shuffled batches of {ROWS} x {LENGTH + 1}",
        unit="M tokens/s",
        more_is_better=True,
        how=f"In each turn, one process reads {TURN_BATCHES} int64 batches from {num_tokens / 1e6:,.0f}M random "
        "tokens, with a warm page cache.",
        not_shown="Disks and networks, which are slower than all of these programs. Training on a CPU needs only "
        "0.1 % of these rates.",
        programs={
            name: Program(
                version=versions[name], settings=settings[name], values=[megatokens / value for value in values]
            )
            for name, values in seconds.items()
        },
    )


def read_batches(reader: Iterator[torch.Tensor]) -> float:
    """Return the time of one turn, in seconds."""
    begun = time.perf_counter()
    for _ in range(TURN_BATCHES):
        batch = next(reader)
    seconds = time.perf_counter() - begun
    assert batch.shape == (ROWS, LENGTH + 1)
    assert batch.dtype == torch.int64
    return seconds


def read_ours(store: Path) -> Iterator[torch.Tensor]:
    """Yield `batches` of two sources."""
    fields = {f"data.sources.{name}.weight": share for name, share in SHARES.items()}
    recipe = Recipe.load("tinyllama-1.1b", {**fields, "train.batch_sequences": ROWS})
    return (batch.sequences for batch in batches(recipe, TokenStore.open(store), 0))


def read_plainly(path: Path) -> Iterator[torch.Tensor]:
    """Yield the rows of a flat file in random order, epoch after epoch."""
    tokens = np.memmap(path, np.uint16, "r")
    tokens.max()  # reads every page into the page cache
    for epoch in itertools.count():
        starts = np.random.default_rng(epoch).permutation((len(tokens) - 1) // LENGTH) * LENGTH
        for batch in starts[: len(starts) // ROWS * ROWS].reshape(-1, ROWS).tolist():
            rows = [tokens[start : start + LENGTH + 1].astype(np.int64) for start in batch]
            yield torch.from_numpy(np.stack(rows))


def read_litdata(folder: Path, flat: Path) -> Iterator[torch.Tensor]:
    """Yield the batches of a shuffled StreamingDataset with a TokensLoader, epoch after epoch."""
    import litdata  # noqa: PLC0415

    write_chunks(folder, flat)
    loader = litdata.TokensLoader(block_size=LENGTH + 1)
    data = litdata.StreamingDataset(str(folder), item_loader=loader, shuffle=True, drop_last=True)
    while True:
        items = (item.long() for item in data)  # a generator, since each iter(data) restarts
        while len(rows := list(itertools.islice(items, ROWS))) == ROWS:
            yield torch.stack(rows)


def write_chunks(folder: Path, flat: Path) -> None:
    """Write the flat file as litdata's chunks of 64 MB."""
    import litdata  # noqa: PLC0415

    size = 1000 * (LENGTH + 1)
    litdata.optimize(
        partial(tokens_from, str(flat), size),
        inputs=list(range(0, flat.stat().st_size // 2, size)),
        output_dir=str(folder),
        chunk_bytes="64MB",
        num_workers=1,
        reorder_files=False,
        item_loader=litdata.TokensLoader(),
        verbose=False,
    )


def tokens_from(flat: str, count: int, start: int) -> Iterator[torch.Tensor]:
    """Yield up to `count` tokens of the flat file; litdata calls this in a separate process."""
    yield torch.from_numpy(np.fromfile(flat, np.uint16, count, offset=2 * start))


def write_random(
    folder: Path, tokens: "np.ndarray[Any, np.dtype[np.uint16]]", shares: Mapping[str, float] = SHARES
) -> Path:
    """Write a store of random tokens, in shards of 20M tokens."""
    ends = np.cumsum([int(len(tokens) * share) for share in shares.values()])[:-1]
    parts = dict(zip(shares, np.split(tokens, ends), strict=True))
    shards = {name: np.array_split(part, -(-len(part) // 20_000_000)) for name, part in parts.items()}
    write_manifests(folder, {name: [len(shard) for shard in own] for name, own in shards.items()}, 0)
    for name, own in shards.items():
        for number, shard in enumerate(own):
            shard.tofile(folder / name / "train" / f"{number:05d}.tokens")
    return folder


def write_manifests(folder: Path, sources: dict[str, list[int]], num_inputs: int) -> None:
    """Write the manifests of a store with these tokens per shard and this number of source files."""
    paths = (f"raw/SlimPajama-627B/train/chunk1/example_train_{number}.jsonl.zst" for number in range(num_inputs))
    entries = ({"path": path, "bytes": 16_000_000, "sha256": SHA256} for path in paths)
    for name, sizes in sources.items():
        shards = [
            {
                "file": f"{number:05d}.tokens",
                "tokens": tokens,
                "documents": 1,
                "sha256": SHA256,
                "documents_sha256": SHA256,
                "inputs": list(itertools.islice(entries, 4)),
            }
            for number, tokens in enumerate(sizes)
        ]
        (folder / name / "train").mkdir(parents=True)
        (folder / name / "train" / "manifest.json").write_text(json.dumps({"shards": shards}, indent=2))
    splits = {name: {"splits": {"train": {"tokens": sum(sizes)}}} for name, sizes in sources.items()}
    inputs = {f"raw/SlimPajama-627B/train/chunk1/example_train_{number}.jsonl.zst": 0 for number in range(num_inputs)}
    manifest = {"format_version": FORMAT_VERSION, "dtype": "<u2", "sources": splits, "inputs": inputs}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def open_a_trillion(folder: Path) -> None:
    """Print the cost of opening a sparse store, and of `sequences` at its first and at a late step."""
    write_sparse(folder)
    opened = [open_in_a_process(folder) for _ in range(5)]
    imported, seconds, tokens, peak = (statistics.median(values) for values in zip(*opened, strict=True))
    print(f"{tokens:,.0f} tokens in {SPARSE_SHARDS:,} shards from {SPARSE_INPUTS:,} files; median of {len(opened)}")
    print(f"  opened in {seconds:.2f} s after {imported:.2f} s of imports; the process peaks at {peak / 1e6:.0f} MB")
    recipe, store = Recipe.load("tinyllama-1.1b"), TokenStore.open(folder)
    steps = (0, 1_430_000)
    turns = [[seconds_of(partial(sequences, recipe, store, step)) for step in steps] for _ in range(100)]
    for step, own in zip(steps, zip(*turns, strict=True), strict=True):
        print(
            f"  sequences at step {step:9,}: {1e3 * statistics.median(own):.2f} ms, at best {1e3 * min(own):.2f}, "
            f"for {recipe.train.batch_sequences:,} rows"
        )


def write_sparse(folder: Path) -> None:
    """Write a sparse store of a trillion zeros, with manifests as long as real manifests."""
    count = round(SPARSE_SHARDS * SHARES["slimpajama"])
    sizes = {"slimpajama": [SPARSE_TOKENS] * count, "starcoderdata": [SPARSE_TOKENS] * (SPARSE_SHARDS - count)}
    write_manifests(folder, sizes, SPARSE_INPUTS)
    for name, own in sizes.items():
        for number, tokens in enumerate(own):
            for suffix, size in ((".tokens", 2 * tokens), (".documents", 8)):
                with (folder / name / "train" / f"{number:05d}{suffix}").open("wb") as file:
                    file.truncate(size)


def open_in_a_process(folder: Path) -> tuple[float, float, float, float]:
    """Return the times of imports and of opening in seconds, the tokens, and the peak memory in bytes."""
    done = subprocess.run([sys.executable, "-c", OPEN, folder], check=True, capture_output=True, text=True)
    imported, opened, tokens = map(float, done.stdout.splitlines()[0].split())
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+)", done.stdout)
    return imported, opened, tokens, 1024 * float(kilobytes)


if __name__ == "__main__":
    main()
