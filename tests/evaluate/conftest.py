"""A small Llama with its tokenizer, and lm-eval's own model of the same weights."""

import pydoc_data.topics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllama.distributed import World
from tinyllama.evaluate.evaluation import evaluate
from tinyllama.evaluate.harness import LlamaLM, load_language_model
from tinyllama.evaluate.results import Evaluation
from tinyllama.evaluate.tasks import load_tasks

SINGLE_PROCESS = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama with context length 96: some of HellaSwag's items fit, others are truncated."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=176,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A small model of Pythia's architecture."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("neox")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=600, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of 600 tokens that adds BOS, as Llama 2's does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    text = "\n".join(list(pydoc_data.topics.topics.values())[:20])
    bpe.train_from_iterator(text.split(), trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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
