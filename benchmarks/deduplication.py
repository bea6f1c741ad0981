"""Speed of deduplication and decontamination next to other programs, and recall on a planted set of documents.

The programs process the English text of benchmarks/texts.py in memory, each in a new process on one core. The speed is
the CPU time of the step alone. The planted set has 100,000 documents of random words: pairs with a known Jaccard
similarity, and documents without a similar one. The stages of `prepare` search it for duplicates.

    python benchmarks/deduplication.py
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datatrove.data import Document
from deduplication_peers import STEPS
from measuring import OURS, Measure, Program, options, take_turns, write_measures
from peers import make_peer, version_of
from texts import make_corpus

from tinyllama.prepare.deduplication import (
    BANDS,
    KEY_RANGES,
    NGRAM_WORDS,
    ROWS,
    find_clusters,
    find_equal_keys,
    read_duplicates,
    write_keys,
)

HERE = Path(__file__).parent
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
UNITS = {"minhash": ("MB/s", 1e6), "exact": ("GB/s", 1e9), "decontamination": ("MB/s", 1e6)}
SIMILARITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
PAIRS, DOCUMENTS, NGRAMS, TASKS = 4000, 100_000, 90, 4
VOCABULARY = 30_000
SETTINGS = {
    "minhash": {
        OURS: "`deduplicate: minhash`",
        "datatrove": "MinhashDedupSignature, words of spaCy",
        "text-dedup": "embed_func of its MinHash, 64 bits",
        "rensa": "RMinHash, n-grams made in Python",
        "marin-dupekit": "CleanText, MinHash and MinHashLSH, n-grams of 5 characters",
    },
    "exact": {
        OURS: "`deduplicate: exact`, BLAKE2b",
        "text-dedup": "its default hash, MD5",
        "marin-dupekit": "hash_xxh3_64_batch, not a cryptographic hash",
    },
    "decontamination": {OURS: "`decontaminate`, 13 words", "datatrove": "NGramsDecontFilter, 13 words of spaCy"},
}
HOW = {
    "minhash": f"Keys of {BANDS} bands of {ROWS} minimum hashes over 5-grams of words.",
    "exact": "Hashes of documents.",
    "decontamination": "Search for the 13-grams of 2,000 items.",
}


def main() -> None:
    """Print the recall on the planted set, and the speed of all programs."""
    arguments = parse_arguments()
    found = recall(PAIRS, DOCUMENTS)
    print(found, flush=True)
    if arguments.megabytes:
        write_measures(arguments.json, [measure(step, arguments, found) for step in STEPS])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--text", type=Path, help="folder with prose/ and code/, each with UTF-8 text files")
    parser.add_argument(
        "--megabytes", type=float, default=4, help="megabytes of text, 0 for the recall alone (default: %(default)s)"
    )
    return parser.parse_args()


def recall(num_pairs: int, num_documents: int) -> str:
    """Return the fraction of the planted pairs that are found, by similarity, and the precision."""
    documents = list(planted_documents(num_pairs, num_documents))
    with tempfile.TemporaryDirectory() as folder:
        dropped = dropped_documents(Path(folder), [text for _, text in documents])
    pairs = dict.fromkeys(SIMILARITIES, 0)
    unrelated = similar = 0
    for number in dropped:
        similarity = documents[number][0]
        if similarity is None:
            unrelated += 1
        else:
            pairs[similarity] += 1
            similar += similarity >= 0.6
    shares = ", ".join(f"{100 * count / num_pairs:.2f} % of {similarity}" for similarity, count in pairs.items())
    return (
        f"of {num_documents:,} documents with {num_pairs:,} pairs per Jaccard similarity, found {shares}; "
        f"{unrelated} others dropped; {100 * similar / len(dropped):.1f} % of all dropped documents have a "
        "similarity of at least 0.6"
    )


def planted_documents(num_pairs: int, num_documents: int) -> Iterator[tuple[float | None, str]]:
    """Yield documents; the second document of a pair has its similarity to the first, all others have None."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"word{chance.randrange(VOCABULARY):x}" for _ in range(count)).translate(LETTERS)

    for similarity in SIMILARITIES:
        shared = round(2 * NGRAMS * similarity / (1 + similarity))
        for _ in range(num_pairs):
            common = words(shared + NGRAM_WORDS - 1)
            yield None, f"{common} {words(NGRAMS - shared)}"
            yield similarity, f"{common} {words(NGRAMS - shared)}"
    for _ in range(num_documents - 2 * num_pairs * len(SIMILARITIES)):
        yield None, words(NGRAMS)


LETTERS = str.maketrans("0123456789", "ghijklmnop")


def dropped_documents(folder: Path, texts: list[str]) -> list[int]:
    """Return the indexes of the documents that the stages of `prepare` find to be duplicates."""
    size = -(-len(texts) // TASKS)
    for task in range(TASKS):
        own = (
            Document(text, str(row), metadata={"input": 0, "row": row})
            for row, text in enumerate(texts[task * size : (task + 1) * size])
        )
        write_keys(folder, "minhash", own, task)
    for rank in range(KEY_RANGES):
        find_equal_keys(folder, TASKS, iter(()), rank)
    find_clusters(folder, TASKS, iter(()), 0)
    return [task * size + number for task in range(TASKS) for number in read_duplicates(folder, task)]


def measure(step: str, arguments: argparse.Namespace, found: str) -> Measure:
    """Measure the programs of a step in turns."""
    work = arguments.work.resolve()
    files = make_corpus(work / "prepare", arguments.text, 30) / "prose"
    peer = make_peer(work, "deduplication")
    pythons = {name: sys.executable if name == OURS else peer for name in STEPS[step]}

    def turn(name: str) -> float:
        command = [pythons[name], HERE / "deduplication_peers.py", step, name, files, str(arguments.megabytes)]
        done = subprocess.run(command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE, text=True)
        seconds, num_bytes = map(float, done.stdout.split()[-2:])
        return num_bytes / UNITS[step][1] / seconds

    values = take_turns({name: partial(turn, name) for name in pythons}, arguments.rounds)
    return Measure(
        section="deduplication",
        name=f"{step} of English",
        unit=UNITS[step][0],
        more_is_better=True,
        how=f"{HOW[step]} {arguments.megabytes:g} MB of English in memory, CPU time of one core.",
        not_shown="Reading files, the comparison of keys, other languages; programs that need a cluster.",
        programs={
            name: Program(
                version=version_of(pythons[name], name),
                settings=SETTINGS[step][name],
                values=values[name],
                found=found if (step, name) == ("minhash", OURS) else "",
            )
            for name in pythons
        },
    )


if __name__ == "__main__":
    main()
