"""A Hugging Face folder as CTranslate2's: float32, and int8 with a scale for each row.

The library's own converter reads the bf16 weights in a child process, once per kind, and converts one matrix at a time,
so the model is in memory once. Each folder also gets the tokenizer's files, since CTranslate2 reads tokens, not text.
"""

from pathlib import Path

from tinyllama.release.isolation import convert

# int8 alone would leave the norms in bf16, and have everything but the products computed in it.
KINDS = {"float32": "float32", "int8": "int8_float32"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def write_ctranslate2(folder: Path, source: Path) -> None:
    """Write `folder/float32` and `folder/int8` from a Hugging Face Llama's folder.

    Raises RunStoppedError where the converter fails or crashes.
    """
    folder.mkdir(parents=True)
    files = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name, kind in KINDS.items():
        convert("ctranslate2", "convert", str(source), str(folder / name), kind, *files)
