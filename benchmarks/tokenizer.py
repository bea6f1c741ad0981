"""Comparison of `Tokenizer.encode_documents` with sentencepiece, tokenizers and gigatoken itself on one core.

The text is the source code and documentation of the installed Python packages, or a corpus of benchmarks/prepare.py
(--corpus). The encoders take turns on blocks of one megabyte, so that other jobs slow all of them. They are new at the
start of each round. Without --tokenizer, a tokenizer of 32,000 tokens is trained on other files of the same packages. A
byte-level tokenizer of 32,000 tokens with GPT-2's pre-tokenizer is trained on a part of the text.

    python benchmarks/tokenizer.py --megabytes 30
"""

import itertools
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from gigatoken.gigatoken_rs import load_hf_json
from measuring import OURS, Measure, Program, options, write_measures
from peers import version_of
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from texts import read_jsonl
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer, training_text

KINDS = {"prose": ["METADATA", "*.md", "*.rst", "*.txt"], "code": ["*.py"]}
NAMES = {"prose": "English", "code": "code"}
BLOCK_BYTES = 1_000_000
TRAINING_CHARACTERS = 4_000_000
VOCABULARIES = {"llama": "Llama-style vocabulary", "bytes": "byte-level vocabulary"}


def main() -> None:
    """Print a table for each vocabulary and kind of text."""
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
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work) / name for name in VOCABULARIES}
        sample = training_text(text for documents in texts.values() for text in documents[1::2])
        if arguments.tokenizer is None:
            train_tokenizer(sample, 32_000).save(folders["llama"])
        else:
            Tokenizer.load(arguments.tokenizer).save(folders["llama"])
        ensure_model(folders["llama"])
        train_byte_level("\n".join(sample.lines)[:TRAINING_CHARACTERS], folders["bytes"])
        measures = []
        for vocabulary, (kind, documents) in itertools.product(VOCABULARIES, texts.items()):
            blocks = to_blocks(documents[::2] if arguments.tokenizer is None else documents, arguments.megabytes)
            turns = [measure(folders[vocabulary], blocks) for _ in range(arguments.rounds)]
            measures.append(as_measure(kind, vocabulary, blocks, turns))
        write_measures(arguments.json, measures)


def read_texts(patterns: Sequence[str]) -> list[str]:
    """Return every UTF-8 file of the installed packages that matches a pattern, in a fixed random order."""
    root = Path(sysconfig.get_path("purelib"))
    paths = sorted(path for pattern in patterns for path in root.rglob(pattern) if path.is_file())
    random.Random(0).shuffle(paths)
    return [text for path in paths if "\ufffd" not in (text := path.read_text("utf-8", errors="replace"))]


def to_blocks(texts: Sequence[str], megabytes: float) -> list[list[str]]:
    """Return documents in blocks of one megabyte, up to `megabytes` in total."""
    blocks: list[list[str]] = [[]]
    total = size = 0
    for text in texts:
        if total >= megabytes * 1e6:
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


def train_byte_level(text: str, folder: Path) -> None:
    """Train a tokenizer with GPT-2's pre-tokenizer and write its tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=32_000, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(folder: Path, blocks: list[list[str]]) -> dict[str, float]:
    """Return the time of each encoder over all blocks, in seconds."""
    document = json.loads((folder / "tokenizer.json").read_bytes())
    path = folder / "tokenizer.model"
    ours = Tokenizer.load(path if path.is_file() else folder)
    ours.start_encoder()
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    giga = load_hf_json(json.dumps(document | {"added_tokens": [], "post_processor": None}))
    encoders: dict[str, Callable[[list[str]], Any]] = {
        OURS: lambda texts: list(ours.encode_documents(texts, bos=False, eos=False)),
        "tokenizers": lambda texts: [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)],
        "gigatoken": lambda texts: [giga.encode(text) for text in texts],
    }
    if path.is_file():
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        encoders["sentencepiece"] = lambda texts: [theirs.encode(text) for text in texts]
    seconds = dict.fromkeys(encoders, 0.0)
    for block in blocks:
        results = {}
        for name, encode in encoders.items():
            start = time.perf_counter()
            results[name] = encode(block)
            seconds[name] += time.perf_counter() - start
        expected = results[reference_of(encoders)]
        if any(ids.tolist() != numbers for ids, numbers in zip(results[OURS], expected, strict=True)):
            raise SystemExit(f"the ids differ from those of {reference_of(encoders)}")
    return seconds


def reference_of(names: Container[str]) -> str:
    """Return the library whose ids the others must have; tokenizers finds special tokens in a text."""
    return "sentencepiece" if "sentencepiece" in names else "tokenizers"


def as_measure(kind: str, vocabulary: str, blocks: list[list[str]], turns: list[dict[str, float]]) -> Measure:
    """Return the megabytes of UTF-8 per second of each encoder."""
    megabytes = sum(len(text.encode()) for block in blocks for text in block) / 1e6
    settings = {
        OURS: "`Tokenizer.encode_documents`, which checks gigatoken's ids before each round",
        "gigatoken": "`encode` of a tokenizer.json without special tokens, one document per call",
        "sentencepiece": "`SentencePieceProcessor.encode`, one document per call",
        "tokenizers": "`Tokenizer.encode_batch_fast`, one megabyte per call, which is faster "
        "than one document per call; no parallelism",
    }
    programs = {
        name: Program(
            version=version_of(sys.executable, name),
            settings=settings[name],
            values=[megabytes / seconds[name] for seconds in turns],
            found=f"the ids equal those of {reference_of(turns[0])}" if name == OURS else "",
        )
        for name in turns[0]
    }
    return Measure(
        section="tokenization",
        name=f"{NAMES[kind]}, {VOCABULARIES[vocabulary]}, encoders alone",
        unit="MB/s",
        more_is_better=True,
        how=f"{megabytes:.0f} MB of {NAMES[kind]} in {sum(map(len, blocks)):,} documents, in memory. One "
        "process on one core runs the encoders alternately, on parts of the text.",
        not_shown="Batches on many cores, text with less repetition than English and code.",
        programs=programs,
    )


if __name__ == "__main__":
    main()
