"""Tokenization of jsonl.zst files by datatrove or litdata on one core, for benchmarks/prepare.py.

The program runs in an environment that has litdata, with the arguments `datatrove BATCH_SIZE FILES OUT TOKENIZER_JSON`
or `litdata FILES OUT TOKENIZER_JSON`. Each program appends `</s>` to a document and keeps the order of the documents.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

END = "</s>"
TEXTS_AT_ONCE = 1000  # litdata has no encoder; encoding many texts per call is faster than one text per call

# ruff: noqa: PLC0415 - each peer is imported only where it runs


def run_datatrove(batch_size: str, files: str, out: str, tokenizer: str) -> None:
    """Run JsonlReader and DocumentTokenizer, without shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(files, compression="zstd", glob_pattern="*.jsonl.zst")
    writer = DocumentTokenizer(out, tokenizer, eos_token=END, shuffle_documents=False, batch_size=int(batch_size))
    LocalPipelineExecutor([reader, writer], logging_dir=f"{out}/log").run()


def run_litdata(files: str, out: str, tokenizer: str) -> None:
    """Run `optimize` with a TokensLoader, two bytes per token, one worker."""
    import litdata

    paths = sorted(map(str, Path(files).glob("*.jsonl.zst")))
    litdata.optimize(
        partial(tokenize, tokenizer),
        inputs=paths,
        output_dir=out,
        chunk_bytes="64MB",
        num_workers=1,
        reorder_files=False,
        item_loader=litdata.TokensLoader(),
        verbose=False,
    )


def tokenize(tokenizer: str, path: str) -> Iterator[Any]:
    """Yield the tokens of each document of a file, as torch tensors."""
    import numpy as np
    import orjson
    import torch
    import zstandard

    encoder = load(tokenizer)
    end = [encoder.token_to_id(END)]
    with Path(path).open("rb") as raw:
        lines = zstandard.ZstdDecompressor().stream_reader(raw).read().splitlines()
    for first in range(0, len(lines), TEXTS_AT_ONCE):
        texts = [orjson.loads(line)["text"] for line in lines[first : first + TEXTS_AT_ONCE]]
        for found in encoder.encode_batch_fast(texts, add_special_tokens=False):
            yield torch.from_numpy(np.array(found.ids + end, np.uint16))


@cache
def load(tokenizer: str) -> Any:
    """Return the encoder, created once per process."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(tokenizer)


def unpack_chunks(out: Path) -> None:
    """Write litdata's tokens without the chunks' headers, so that they can be compared."""
    chunks = json.loads((out / "index.json").read_bytes())["chunks"]
    for number, chunk in enumerate(chunks):
        data = (out / chunk["filename"]).read_bytes()
        header = 4 * (int.from_bytes(data[:4], "little") + 2)
        (out / f"{number:05d}.tokens").write_bytes(data[header:])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["datatrove", *arguments]:
            run_datatrove(*arguments)
        case ["litdata", *arguments]:
            run_litdata(*arguments)
            unpack_chunks(Path(arguments[1]))
