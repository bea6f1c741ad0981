"""Check of the import of Llama 3's tokenizer against Meta's tokenizer, and the speed of its encoding.

`make check-llama3` downloads llama-models, which contains Llama 3's rank file, and tiktoken. The imported tokenizer
must have tiktoken's ids in `tokenizers`, in our encoder, in transformers and in llama.cpp. The texts are the project's
edge cases, random Unicode, and the embedded corpus, or a sample of the corpus for the last two. The special tokens must
have Meta's ids. The encoder and `tokenizers` then encode the embedded corpus in turns, a megabyte at a time. The exit
status is 1 if an id differs. llama.cpp's version of Unicode is older, so its random texts contain no newer characters.

    make check-llama3
"""

import argparse
import math
import os
import random
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import spread
from transformers import AutoTokenizer

from tinyllama import cli
from tinyllama.model.llama import Llama, initialize
from tinyllama.prepare.corpus import FOLDERS, write_corpus
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import list_files
from tinyllama.recipe import Model, Source
from tinyllama.release.engines import open_llama_cpp
from tinyllama.release.gguf import write_gguf
from tinyllama.release.release import write_hugging_face
from tinyllama.release.verify import TEXT, TOKENIZER_TEST_TEXTS
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.conversion import edge_case_texts
from tokenizer import to_blocks

SHAPE = Model(dim=64, layers=1, heads=2, kv_heads=2, ffn_dim=64, context_length=64)
ENCODERS = ("tinyllama", "tokenizers")
SIGNS = (
    "'\u2019sStTlLrReEvVmMdD\u017f",
    "0123456789\u0663\u096a\xb2\xbd\u2167\u3007\u4e00",
    "\t\n\r \v\f\x85\xa0\u2028\u200b\ufeff",
)


def main() -> None:
    """Import the tokenizer, compare the ids, and print the speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=50_000, help="number of random texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random texts")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed measurement")
    arguments = parser.parse_args()
    import llama_models.llama3.tokenizer as meta  # noqa: PLC0415 - `make check-llama3` downloads it; --help needs none

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source = Path(meta.__file__).with_name("tokenizer.model")
    theirs = meta.Tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if cli.main(["tokenizer", "import", str(source), str(work / "tokenizer")]):
            raise SystemExit("the import failed")
        tokenizer = Tokenizer.load(work / "tokenizer")
        write_corpus(work / "corpus")
        documents = list(read_documents(work / "corpus"))
        problems = compare(tokenizer, theirs, work, documents, random_texts(tokenizer, arguments.texts, arguments.seed))
        measure(tokenizer, documents, arguments.rounds)
    if problems:
        raise SystemExit("\n".join(problems))


def compare(tokenizer: Tokenizer, theirs: Any, work: Path, documents: list[str], randoms: Sequence[str]) -> list[str]:
    """Print the number of compared texts by engine and kind; return a line for each pair that differs."""
    problems = []
    for name, number in theirs.special_tokens.items():
        if tokenizer.decode([number]) or tokenizer._backend.token(number) != name:
            problems.append(f"{number} is not {name}")
    hugging_face = AutoTokenizer.from_pretrained(work / "tokenizer")
    llama_cpp = open_gguf(tokenizer, work)
    vocabulary = [token.decode(errors="ignore") for token in tokenizer.token_bytes()]
    edge_cases = [*edge_case_texts(vocabulary), *TOKENIZER_TEST_TEXTS, TEXT]
    sample = documents[:: len(documents) // 1_000]
    known = [text for text in randoms if all(map(is_old, text))]
    engines: dict[str, tuple[Callable[[str], list[int]], dict[str, Sequence[str]]]] = {
        "tokenizers": (tokenizer.encode, {"edge cases": edge_cases, "random": randoms, "corpus": documents}),
        "tinyllama": (
            lambda text: tokenizer.encode_array(text).tolist(),
            {"edge cases": edge_cases, "random": randoms, "corpus": documents},
        ),
        "transformers": (
            lambda text: hugging_face(text, split_special_tokens=True).input_ids[1:],
            {"edge cases": edge_cases, "random": randoms[:5_000], "corpus": sample},
        ),
        "llama.cpp": (
            lambda text: llama_cpp.tokenize(text.encode())[1:],
            {"edge cases": edge_cases, "random": known, "corpus": sample},
        ),
    }
    expected: dict[str, list[int]] = {}
    for engine, (encode, kinds) in engines.items():
        for kind, texts in kinds.items():
            wrong = []
            for text in texts:
                if text not in expected:
                    expected[text] = theirs.model.encode(text, disallowed_special=())
                if encode(text) != expected[text]:
                    wrong.append(text)
            print(f"{engine}, {kind}: {len(texts) - len(wrong):,} of {len(texts):,} texts have tiktoken's ids")
            problems += [f"{engine}, {kind}: {text[:60]!r}" for text in wrong[:5]]
    return problems


def open_gguf(tokenizer: Tokenizer, work: Path) -> Any:
    """Return llama.cpp's vocabulary of a GGUF file with this tokenizer and a small model."""
    model = Llama(SHAPE, tokenizer.vocab_size)
    initialize(model, 0)
    write_hugging_face(work / "model", model, tokenizer)
    write_gguf(work / "gguf", work / "model", "model")
    return open_llama_cpp(str(work / "gguf/model-F16.gguf"), vocab_only=True)


def read_documents(corpus: Path) -> Iterator[str]:
    """Yield the documents of the embedded corpus."""
    for name in FOLDERS:
        source = Source(format=name, path=str(corpus / name), weight=1)
        for file in list_files(name, source):
            yield from (to_str(row.text) for row in read_rows(file.path, source) if isinstance(row, SourceRow))


def random_texts(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Return texts of tokens, special tokens, signs that the pre-tokenizer distinguishes, and all of Unicode."""
    choose = random.Random(seed)
    tokens = [token.decode(errors="ignore") for token in tokenizer.token_bytes()]
    special = [tokenizer._backend.token(number) or "" for number in range(128_000, tokenizer.vocab_size)]
    unicode = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    pools = [tokens, tokens, tokens, special, unicode[:0x80], unicode[:0x3000], unicode, *SIGNS]

    def part() -> str:
        pool = choose.choice(pools)
        return "".join(choose.choices(pool, k=choose.randint(1, 4)))

    return ["".join(part() for _ in range(choose.randint(1, 20))) for _ in range(count)]


def is_old(character: str) -> bool:
    """Return whether Unicode 14 has a character, or whether no version up to 17 has it."""
    return unicodedata.category(character) != "Cn" or ord(character) >= 0x40000


def measure(tokenizer: Tokenizer, documents: list[str], rounds: int) -> None:
    """Print the speed of the encoder and of `tokenizers` on the same blocks; the ids are equal."""
    blocks = to_blocks(documents, math.inf)
    megabytes = sum(len(text.encode()) for block in blocks for text in block) / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in ENCODERS}
    library = tokenizer._backend.tokenizer
    for _ in range(rounds):
        fresh = Tokenizer(tokenizer._backend)
        fresh.start_encoder()
        encoders: dict[str, Callable[[list[str]], list[list[int]]]] = {
            "tinyllama": lambda texts, fresh=fresh: list(fresh.encode_documents(texts, bos=False, eos=False)),
            "tokenizers": lambda texts: [
                found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)
            ],
        }
        seconds = dict.fromkeys(ENCODERS, 0.0)
        for block in blocks:
            results = []
            for name in ENCODERS:
                start = time.process_time()
                results.append(encoders[name](block))
                seconds[name] += time.process_time() - start
            if any(ids.tolist() != other for ids, other in zip(*results, strict=True)):
                raise SystemExit("the ids of the encoder and of tokenizers differ")
        for name in ENCODERS:
            speeds[name].append(megabytes / seconds[name])
    ratios = [ours / other for ours, other in zip(*speeds.values(), strict=True)]
    for name, values in speeds.items():
        print(f"{name}: {spread(values)} MB per second of CPU time, {megabytes:.0f} MB, {rounds} rounds")
    print(f"ratio: {spread(ratios)}")


if __name__ == "__main__":
    main()
