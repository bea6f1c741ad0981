"""How fast `Tokenizer.encode_array` is beside sentencepiece and tokenizers: one core, same texts, same run, same ids.

Reads the source text and the documents of the Python packages that are installed here. The three encoders take turns
on blocks of the text, so that a busy machine slows all three; "cold" is a first pass with an empty memo over text that
the vocabulary was not trained on, "again" a second pass. Without --tokenizer, 32,000 pieces are trained on other files
of the same packages.

    python benchmarks/tokenizer.py --megabytes 30
"""

import argparse
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer_training import import_tokenizer, train_tokenizer

KINDS = {"code": ["*.py"], "prose": ["METADATA", "*.md", "*.rst", "*.txt"]}
BLOCK_BYTES = 1_000_000


def main() -> None:
    """Print one table for code and one for prose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a tokenizer.model, or a folder that has one (default: train one)")
    parser.add_argument("--megabytes", type=float, default=30, help="text of each kind, where there is so much")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = {kind: read_texts(patterns) for kind, patterns in KINDS.items()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokenizer is None:
            train_tokenizer((text for whole in texts.values() for text in whole[1::2]), 32_000).save(folder)
        else:
            import_tokenizer(arguments.tokenizer, folder)
        for kind, whole in texts.items():
            unseen = whole[::2] if arguments.tokenizer is None else whole
            blocks = to_blocks(unseen, int(arguments.megabytes * 1e6))
            print_table(kind, blocks, measure(Path(folder), blocks))


def read_texts(patterns: Sequence[str]) -> list[str]:
    """Every file of the installed packages that fits a pattern and is UTF-8, in one fixed random order."""
    root = Path(sysconfig.get_path("purelib"))
    paths = sorted(path for pattern in patterns for path in root.rglob(pattern) if path.is_file())
    random.Random(0).shuffle(paths)
    return [text for path in paths if "\ufffd" not in (text := path.read_text("utf-8", errors="replace"))]


def to_blocks(texts: Sequence[str], num_bytes: int) -> list[list[str]]:
    """Documents in blocks of a megabyte, up to `num_bytes` in all."""
    blocks: list[list[str]] = [[]]
    total = size = 0
    for text in texts:
        if total >= num_bytes:
            break
        if size >= BLOCK_BYTES:
            blocks.append([])
            size = 0
        blocks[-1].append(text)
        total, size = total + len(text.encode()), size + len(text.encode())
    return blocks


def measure(folder: Path, blocks: list[list[str]]) -> dict[str, float]:
    """Seconds of each encoder over all blocks."""
    ours = Tokenizer.load(folder / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoders: dict[str, Callable[[str], Any]] = {
        "tinyllama, cold": ours.encode_array,
        "sentencepiece": theirs.encode,
        "tokenizers": lambda text: fast.encode(text, add_special_tokens=False).ids,
    }
    seconds = dict.fromkeys([*encoders, "tinyllama, again"], 0.0)
    for block in blocks:
        results = []
        for name, encode in encoders.items():
            start = time.perf_counter()
            results.append([encode(text) for text in block])
            seconds[name] += time.perf_counter() - start
        if any(ids.tolist() != expected for ids, expected in zip(results[0], results[1], strict=True)):
            raise SystemExit("the ids differ from sentencepiece's")
    for block in blocks:
        start = time.perf_counter()
        for text in block:
            ours.encode_array(text)
        seconds["tinyllama, again"] += time.perf_counter() - start
    return seconds


def print_table(kind: str, blocks: list[list[str]], seconds: dict[str, float]) -> None:
    """Megabytes of UTF-8 a second, and how many times sentencepiece that is."""
    megabytes = sum(len(text.encode()) for block in blocks for text in block) / 1e6
    print(f"{kind}: {megabytes:.1f} MB in {sum(map(len, blocks)):,} files")
    for name, value in seconds.items():
        ratio = seconds["sentencepiece"] / value
        print(f"  {name:18}{megabytes / value:6.1f} MB/s   {ratio:5.2f} x sentencepiece")


if __name__ == "__main__":
    main()
