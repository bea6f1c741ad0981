"""A Hugging Face folder as CTranslate2's: float32, and int8 with a scale for each row.

The library's own converter reads the bf16 weights, once for each; float32 ones take their place a matrix at a time, so
the model is in memory once. The tokenizer's files lie beside, for CTranslate2 reads tokens and no text.
"""

from pathlib import Path
from typing import Any

from ctranslate2.converters import TransformersConverter
from transformers.utils import logging

# int8 alone would leave the norms in bf16, and have everything but the products computed in it.
KINDS = {"float32": "float32", "int8": "int8_float32"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def write_ctranslate2(folder: Path, source: Path) -> None:
    """Write `folder/float32` and `folder/int8` from a Hugging Face Llama's folder."""
    folder.mkdir(parents=True)
    files = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    logging.disable_progress_bar()
    for name, kind in KINDS.items():
        _Converter(str(source), copy_files=files).convert(str(folder / name), quantization=kind)


class _Converter(TransformersConverter):  # type: ignore[misc]
    def load_model(self, *arguments: Any, **options: Any) -> Any:
        """The model, its weights copied out of the mapped files, which would stay in memory until the last is freed."""
        model = super().load_model(*arguments, **options)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model
