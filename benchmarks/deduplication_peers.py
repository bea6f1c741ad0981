"""Deduplication and decontamination of English text by one program on one core, for benchmarks/deduplication.py.

The program runs with the arguments `STEP PROGRAM FILES MEGABYTES`, in an environment that has PROGRAM. It prints the
seconds of CPU time for the step, without imports and without reading files, and the bytes of text. Each program uses
its documented functions, on one document or one batch at a time.
"""

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import zstandard

BANDS, ROWS, NGRAM = 24, 9, 5
ITEM_WORDS, ITEMS, DECONTAMINATION_WORDS = 70, 2000, 13

# ruff: noqa: PLC0415 - each program is imported only where it runs


def main() -> None:
    """Print the CPU time of the step, in seconds, and the number of bytes."""
    step, program, files, megabytes = sys.argv[1:]
    texts = read(Path(files), float(megabytes) * 1e6)
    run = STEPS[step][program](texts[-1:])
    run(texts[:1])
    begun = time.process_time()
    run(texts)
    print(time.process_time() - begun, sum(len(text.encode()) for text in texts))


def read(folder: Path, num_bytes: float) -> list[str]:
    """Return documents with `num_bytes` of text in total."""
    texts: list[str] = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        with zstandard.open(path, "rb") as file:
            for line in file.read().splitlines():
                texts.append(orjson.loads(line)["text"])
                num_bytes -= len(texts[-1].encode())
                if num_bytes < 0:
                    return texts
    return texts


Run = Callable[[list[str]], Any]


def minhash_tinyllama(texts: list[str]) -> Run:
    """Return the step of `prepare`."""
    from tinyllama.prepare.deduplication import minhash_keys

    return lambda texts: list(minhash_keys(iter(texts)))


def minhash_datatrove(texts: list[str]) -> Run:
    """Return the step of datatrove, which splits words with spaCy."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    hashes = HashConfig(hash_fc="sha1")
    config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=hashes)
    step = MinhashDedupSignature(tempfile.mkdtemp(), config)
    return lambda texts: [step.get_signature(step.get_shingles(text)) for text in texts]


def minhash_text_dedup(texts: list[str]) -> Run:
    """Return the step of text-dedup, with its default of 64 bits."""
    import numpy as np
    from text_dedup.minhash import embed_func
    from text_dedup.utils import xxh3_32hash

    random, prime = np.random.RandomState(42), np.uint64((1 << 61) - 1)
    factors, summands = (random.randint(low, prime, size=BANDS * ROWS, dtype=np.uint64) for low in (1, 0))
    options = {
        "num_perm": BANDS * ROWS,
        "ngram_size": NGRAM,
        "min_length": NGRAM,
        "hashranges": [(band * ROWS, (band + 1) * ROWS) for band in range(BANDS)],
        "permutations": (factors, summands),
        "hash_func": xxh3_32hash,
        "dtype": np.uint64,
        "max_hash": np.uint32((1 << 32) - 1),
        "modulo_prime": prime,
    }
    return lambda texts: [embed_func(text, number, **options) for number, text in enumerate(texts)]


def minhash_rensa(texts: list[str]) -> Run:
    """Return the step of rensa, whose n-grams are made in Python."""
    from rensa import RMinHash

    def sign(text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        minhash = RMinHash(num_perm=BANDS * ROWS, seed=42)
        minhash.update([" ".join(words[place : place + NGRAM]) for place in range(len(words) - NGRAM + 1)])
        return minhash.digest()

    return lambda texts: list(map(sign, texts))


def minhash_dupekit(texts: list[str]) -> Run:
    """Return the step of dupekit, whose n-grams are characters."""
    import pyarrow as pa
    from dupekit import Transformation, transform

    steps = [
        Transformation.CleanText("text", "clean"),
        Transformation.MinHash("clean", "signature", BANDS * ROWS, NGRAM, 42),
        Transformation.MinHashLSH("signature", "bands", BANDS),
        Transformation.SelectColumns(["bands"]),
    ]
    return lambda texts: transform(pa.RecordBatch.from_pydict({"text": texts}), steps)


def exact_tinyllama(texts: list[str]) -> Run:
    """Return the step of `prepare`."""
    from tinyllama.prepare.deduplication import exact_keys

    return lambda texts: list(exact_keys(iter(texts)))


def exact_text_dedup(texts: list[str]) -> Run:
    """Return the step of text-dedup, with its default hash."""
    from text_dedup.utils import md5_digest

    return lambda texts: [md5_digest(text.encode()) for text in texts]


def exact_dupekit(texts: list[str]) -> Run:
    """Return the step of dupekit."""
    from dupekit import hash_xxh3_64_batch

    return lambda texts: hash_xxh3_64_batch([text.encode() for text in texts])


def items(texts: list[str]) -> list[str]:
    """Return overlapping parts of a text, as the items of an evaluation task."""
    words = texts[0].split()
    return [" ".join(words[place : place + ITEM_WORDS]) for place in range(min(ITEMS, len(words)))]


def decontamination_tinyllama(texts: list[str]) -> Run:
    """Return the step of `prepare`."""
    from tinyllama.prepare.decontamination import build_index, matching_items

    index = build_index({"task": items(texts)}, DECONTAMINATION_WORDS)
    return lambda texts: [matching_items(index, text, DECONTAMINATION_WORDS) for text in texts]


def decontamination_datatrove(texts: list[str]) -> Run:
    """Return the step of datatrove, which splits words with spaCy."""
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.hashes.sha1 import sha1_hash64
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.text import ngrams, simplify_text
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    folder, tokenizer = tempfile.mkdtemp(), load_word_tokenizer("en")
    split = [tokenizer.word_tokenize(simplify_text(item)) for item in items(texts)]
    hashes = {sha1_hash64(" ".join(own)) for words in split for own in ngrams(words, DECONTAMINATION_WORDS)}
    np.array(sorted(hashes), np.uint64).tofile(Path(folder) / "task.index.hashes")
    config = NGramsDecontConfig(n_grams=DECONTAMINATION_WORDS, hash_config=HashConfig(hash_fc="sha1"))
    step = NGramsDecontFilter(folder, config)
    return lambda texts: [step.filter(Document(text, "")) for text in texts]


STEPS: dict[str, dict[str, Callable[[list[str]], Run]]] = {
    "minhash": {
        "tinyllama": minhash_tinyllama,
        "datatrove": minhash_datatrove,
        "text-dedup": minhash_text_dedup,
        "rensa": minhash_rensa,
        "marin-dupekit": minhash_dupekit,
    },
    "exact": {"tinyllama": exact_tinyllama, "text-dedup": exact_text_dedup, "marin-dupekit": exact_dupekit},
    "decontamination": {"tinyllama": decontamination_tinyllama, "datatrove": decontamination_datatrove},
}

if __name__ == "__main__":
    main()
