"""Memory of `Tokenizer.encode_documents` over gigabytes of text whose words do not repeat.

The words are seven random letters, so almost every word is new and the encoder's cache of words grows without an end.
The script prints the memory of the process after each gigabyte, and the peak.

    python benchmarks/encoder_memory.py runs/demo --gigabytes 10
"""

import argparse
import resource
import time

import numpy as np

from tinyllama.hardware import resident_memory_bytes
from tinyllama.tokenizer import Tokenizer

WORD_LETTERS = 7
DOCUMENT_BYTES = 80_000
BLOCK_DOCUMENTS = 125


def main() -> None:
    """Encode the text and print the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="a tokenizer's folder")
    parser.add_argument("--gigabytes", type=int, default=10, help="gigabytes of text (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    random = np.random.default_rng(0)
    seconds, num_tokens = 0.0, 0
    print("text    memory  rate per core")
    for block in range(1, arguments.gigabytes * 100 + 1):
        documents = [random_words(random) for _ in range(BLOCK_DOCUMENTS)]
        begun = time.process_time()
        num_tokens += sum(len(ids) for ids in tokenizer.encode_documents(documents))
        seconds += time.process_time() - begun
        if block % 100 == 0:
            rate = block * BLOCK_DOCUMENTS * DOCUMENT_BYTES / 1e6 / seconds
            print(f"{block // 100:3} GB  {resident_memory_bytes() / 1e9:.2f} GB  {rate:.1f} MB/s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak {peak / 1e9:.2f} GB; {num_tokens / 1e9:.2f} billion tokens")


def random_words(random: np.random.Generator) -> str:
    """Return a document of random words."""
    letters = random.integers(
        ord("a"), ord("z") + 1, (DOCUMENT_BYTES // (WORD_LETTERS + 1), WORD_LETTERS + 1), np.uint8
    )
    letters[:, -1] = ord(" ")
    return letters.tobytes().decode("ascii")


if __name__ == "__main__":
    main()
