"""A small Llama with its tokenizer, and lm-eval's own model of the same weights."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from tests.release.formats import SHAPE, random_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tinyllama.distributed import World
from tinyllama.evaluate.evaluation import evaluate
from tinyllama.evaluate.harness import LlamaLM, load_language_model
from tinyllama.evaluate.results import Evaluation
from tinyllama.evaluate.tasks import load_tasks
from tinyllama.release.release import write_hugging_face
from tinyllama.tokenizer import Tokenizer

SINGLE_PROCESS = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def llama_folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with context length 96: some of HellaSwag's items fit, others are truncated."""
    folder, tokenizer = tmp_path_factory.mktemp("llama") / "model", Tokenizer.load(small / "tokenizer")
    shape = SHAPE.model_copy(update={"context_length": 96})
    write_hugging_face(folder, random_model(tokenizer.vocab_size, shape), tokenizer)
    return folder


@pytest.fixture(scope="session")
def neox_folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of Pythia's architecture."""
    pytest.importorskip("accelerate")
    folder, tokenizer = tmp_path_factory.mktemp("neox"), Tokenizer.load(small / "tokenizer")
    tokenizer.save(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(folder)
    return folder


@cache
def loaded(task: str) -> Task:
    return load_tasks([task]).tasks[task]


def requests_of(task: Task, items: int) -> list[Instance]:
    task.build_all_requests(limit=items, rank=0, world_size=1)
    instances: list[Instance] = task.instances
    return instances


def our_model(folder: Path, batch_size: int = 8) -> LlamaLM:
    model = load_language_model(folder, batch_size, torch.float32, SINGLE_PROCESS)
    assert isinstance(model, LlamaLM)
    return model


def hugging_face_model(folder: Path) -> LM:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate", exc_type=ImportError)
    return harness.HFLM(pretrained=str(folder), dtype="float32", batch_size=8, device="cpu")


def scored(
    folder: Path, tasks: Sequence[str] = ("winogrande",), limit: int = 10, batch_size: int = 16, **options: Any
) -> Evaluation:
    return evaluate(folder, tasks, limit=limit, batch_size=batch_size, precision=torch.float32, **options)
