"""Comparison of `Tokenizer.encode_documents` with sentencepiece and tokenizers on one core, with equal documents.

The text is the source code and documentation of the installed Python packages, or a corpus of benchmarks/prepare.py
(--corpus). The three encoders take turns on blocks of one megabyte, so that other jobs slow all three. tinyllama's
cache is empty at the start of each round. Without --tokenizer, a tokenizer of 32,000 tokens is trained on other files
of the same packages.

    python benchmarks/tokenizer.py --megabytes 30
"""

import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from measuring import OURS, Measure, Program, options, write_measures
from peers import version_of
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from texts import read_jsonl

from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer, training_text

KINDS = {"prose": ["METADATA", "*.md", "*.rst", "*.txt"], "code": ["*.py"]}
NAMES = {"prose": "English", "code": "code"}
BLOCK_BYTES = 1_000_000
FOUND = {OURS: "the ids equal those of sentencepiece"}


def main() -> None:
    """Print a table for code and a table for prose."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--tokenizer", help="a tokenizer.model, or a folder that has one (default: train one)")
    parser.add_argument(
        "--corpus", type=Path, help="folder with prose/ and code/, each with .jsonl.zst files in SlimPajama's schema"
    )
    parser.add_argument("--megabytes", type=float, default=30, help="maximum megabytes of text of each kind")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = {
        kind: list(read_jsonl(arguments.corpus / kind)) if arguments.corpus else read_texts(patterns)
        for kind, patterns in KINDS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tokenizer is None:
            sample = training_text(text for documents in texts.values() for text in documents[1::2])
            train_tokenizer(sample, 32_000).save(folder)
        else:
            Tokenizer.load(arguments.tokenizer).save(folder)
        ensure_model(Path(folder))
        measures = []
        for kind, documents in texts.items():
            unseen = documents[::2] if arguments.tokenizer is None else documents
            blocks = to_blocks(unseen, int(arguments.megabytes * 1e6))
            turns = [measure(Path(folder), blocks) for _ in range(arguments.rounds)]
            measures.append(as_measure(kind, blocks, turns))
        write_measures(arguments.json, measures)


def read_texts(patterns: Sequence[str]) -> list[str]:
    """Return every UTF-8 file of the installed packages that matches a pattern, in a fixed random order."""
    root = Path(sysconfig.get_path("purelib"))
    paths = sorted(path for pattern in patterns for path in root.rglob(pattern) if path.is_file())
    random.Random(0).shuffle(paths)
    return [text for path in paths if "\ufffd" not in (text := path.read_text("utf-8", errors="replace"))]


def to_blocks(texts: Sequence[str], num_bytes: int) -> list[list[str]]:
    """Return documents in blocks of one megabyte, up to `num_bytes` in total."""
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


def ensure_model(folder: Path) -> None:
    """Write the tokenizer.model of a Llama-style tokenizer.json; scores decrease with the merges' ranks.

    The ids are compared for every text of the benchmark.
    """
    if (folder / "tokenizer.model").is_file():
        return
    document = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    results = ["".join(merge).replace(" ", "") for merge in document["merges"]]
    scores: dict[str, float] = {}
    for rank, text in enumerate(results):
        scores.setdefault(text, -float(rank) if text.strip("▁") else -1e9)
    types = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    model = ModelProto()
    model.trainer_spec.model_type = TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for text, _ in sorted(document["vocab"].items(), key=lambda item: int(item[1])):
        model.pieces.add(piece=text, score=scores.get(text, -float(len(results))), type=types.get(text, 1))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def measure(folder: Path, blocks: list[list[str]]) -> dict[str, float]:
    """Return the time of each encoder over all blocks, in seconds."""
    ours = Tokenizer.load(folder / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoders: dict[str, Callable[[list[str]], Any]] = {
        OURS: lambda texts: list(ours.encode_documents(texts, bos=False, eos=False)),
        "sentencepiece": lambda texts: [theirs.encode(text) for text in texts],
        "tokenizers": lambda texts: [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)],
    }
    seconds = dict.fromkeys(encoders, 0.0)
    for block in blocks:
        results = []
        for name, encode in encoders.items():
            start = time.perf_counter()
            results.append(encode(block))
            seconds[name] += time.perf_counter() - start
        if any(ids.tolist() != expected for ids, expected in zip(results[0], results[1], strict=True)):
            raise SystemExit("the ids differ from sentencepiece's")
    return seconds


def as_measure(kind: str, blocks: list[list[str]], turns: list[dict[str, float]]) -> Measure:
    """Return the megabytes of UTF-8 per second of each encoder."""
    megabytes = sum(len(text.encode()) for block in blocks for text in block) / 1e6
    settings = {
        OURS: "`Tokenizer.encode_documents`, with an empty cache at the start of each round",
        "sentencepiece": "`SentencePieceProcessor.encode`, one document per call",
        "tokenizers": "`Tokenizer.encode_batch_fast`, one megabyte per call, which is faster "
        "than one document per call; no parallelism",
    }
    programs = {
        name: Program(
            version=version_of(sys.executable, name),
            settings=settings[name],
            values=[megabytes / seconds[name] for seconds in turns],
            found=FOUND.get(name, ""),
        )
        for name in turns[0]
    }
    return Measure(
        section="tokenization",
        name=f"{NAMES[kind]}, encoders alone",
        unit="MB/s",
        more_is_better=True,
        how=f"{megabytes:.0f} MB of {NAMES[kind]} in {sum(map(len, blocks)):,} documents, in memory. One "
        "process on one core runs the encoders alternately, on parts of the text.",
        not_shown="Batches on many cores, other vocabularies, text with less repetition than English and code.",
        programs=programs,
    )


if __name__ == "__main__":
    main()
