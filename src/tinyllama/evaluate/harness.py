"""Our network as a language model of lm-eval, and lm-eval's scores of it.

Gives the log-likelihoods of lm-eval's own `hf` model on the same weights. Only the positions that predict a
continuation become logits, 1024 at a time: 131 MB at 32,000 pieces, however long the batch.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import lm_eval
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import cross_entropy

from tinyllama.errors import InputError
from tinyllama.evaluate.tasks import quiet
from tinyllama.files import read_json
from tinyllama.model.generation import generate
from tinyllama.model.llama import Llama
from tinyllama.model.loading import load_model, load_tokenizer, locate
from tinyllama.progress import Bar
from tinyllama.tokenizer import Tokenizer

_LOGITS_POSITIONS = 1024

Pair = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""


def load_language_model(source: Path, batch_size: int, precision: torch.dtype) -> LM:
    """A run, checkpoint, release or Hugging Face folder as a language model of lm-eval, on the GPU where there is one.

    A Llama becomes `LlamaLM`; any other causal model of transformers goes through lm-eval's `hf`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = locate(source)
    config = found.folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") != "llama":
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - imports transformers and accelerate

        return HFLM(pretrained=str(found.folder), device=device, batch_size=batch_size, dtype=precision)
    tokenizer = load_tokenizer(source)
    front = _front(found.tokenizer_folder / "tokenizer.json", tokenizer)
    return LlamaLM(load_model(source, precision).to(device), tokenizer, batch_size, front)


def _front(file: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids that every text begins with: `<s>`, unless a tokenizer.json is there and does not put it in front."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if not file.is_file():
        return start
    own = tokenizers.Tokenizer.from_file(str(file)).encode("").ids
    return [number for number in start if number in own]


def score(model: LM, tasks: Mapping[str, Task], limit: int | None) -> dict[str, dict[str, float]]:
    """Every metric of every task with its standard error, as shares of 1, and the numbers of items."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    # lm-eval's own model shows lm-eval's bars; ours has one of its own.
    with quiet() if isinstance(model, LlamaLM) else nullcontext():
        results = lm_eval.evaluate(model, {"tasks": dict(tasks)}, limit=limit, log_samples=False)
    return {name: _row(results["results"][name], results["n-samples"][name]) for name in tasks}


def _row(metrics: Mapping[str, Any], items: Mapping[str, int]) -> dict[str, float]:
    numbers = {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
    return numbers | {"items": items["effective"], "total_items": items["original"]}


class LlamaLM(TemplateLM):  # type: ignore[misc]  # lm-eval's documented interface; it has no types
    """Our network behind lm-eval's interface, whose method names and arguments these are.

    `front` stands before every text: `<s>` for ours, for every document that they are trained on begins with it.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch_size: int, front: list[int]) -> None:
        super().__init__()
        self.model, self.llama_tokenizer, self.batch_size, self.front = model, tokenizer, batch_size, front
        self.stderr = sys.stderr  # lm-eval runs with its own swallowed, but progress shall be seen

    @property
    def eot_token_id(self) -> int | None:
        """The id of `</s>`."""
        return self.llama_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The id that stands for an empty context: `<s>`, or `</s>` where there is none."""
        bos_id = self.llama_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text behind what stands before every text."""
        ids = self.llama_tokenizer.encode(string)
        return ids if add_special_tokens is False else [*self.front, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text in windows of the context; `<s>` counts, as in lm-eval's `hf`."""
        windows = [list(self._windows(*request.args)) for request in requests]
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The greedy completion of each context up to its first stop string."""
        return [self._complete(*request.args) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _windows(self, text: str) -> Iterable[Pair]:
        ids, context = self.tok_encode(text), self.model.shape.context
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, context, 1))

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Longest first, so that a batch is of one length and what does not fit in memory fails at once."""
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        scores: dict[int, tuple[float, bool]] = {}
        with redirect_stderr(self.stderr), Bar("score", len(pairs)) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                scores |= zip(batch, score_batch(self.model, [pairs[index] for index in batch]), strict=True)
                bar.show(len(scores), "requests")
        return [scores[index] for index in range(len(pairs))]

    def _complete(self, context: str, options: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(options)
        if options["do_sample"]:
            raise InputError("the task samples its completions; only tasks with greedy ones can be scored")
        room = max(1, self.model.shape.context - options["max_gen_toks"])
        prompt = self.tok_encode(context)[-room:]
        ids: list[int] = []
        text = ""
        for token in generate(self.model, prompt, options["max_gen_toks"], stop_id=self.eot_token_id):
            ids.append(token)
            text = self.llama_tokenizer.decode(ids)
            if any(stop in text for stop in options["until"]):
                break
        completion: str = postprocess_generated_text(text, options["until"], None)
        return completion


@torch.inference_mode()
def score_batch(model: Llama, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation after its context, and whether it is the model's greedy choice.

    What is longer than the model's context loses its beginning; if its continuation alone is, InputError.
    """
    context = model.shape.context
    rows = [(before + after)[-(context + 1) :] for before, after in pairs]
    lengths = [len(after) for _, after in pairs]
    if max(lengths) > context:
        raise InputError(f"a continuation has {max(lengths)} tokens; the model's context holds {context}")
    # Padding stands to the right, where nothing that is scored can see it: no mask is needed.
    ids = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[index, : len(row) - 1] = torch.tensor(row[:-1])
        predicts[index, len(row) - 1 - length : len(row) - 1] = True
    device = model.embedding.weight.device
    hidden = model.hidden(ids.to(device))[predicts.to(device)]
    targets = torch.tensor([token for _, after in pairs for token in after], device=device)
    log_likelihoods, greedy = _compare(model, hidden, targets)
    by_pair = zip(torch.split(log_likelihoods, lengths), torch.split(greedy, lengths), strict=True)
    return [(float(likelihood.sum()), bool(same.all())) for likelihood, same in by_pair]


def _compare(model: Llama, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden[N, D], targets int64[N] -> their log-likelihoods float32[N], whether the likeliest bool[N]."""
    log_likelihoods, greedy = [], []
    parts = (torch.split(tensor, _LOGITS_POSITIONS) for tensor in (hidden, targets))
    for part, wanted in zip(*parts, strict=True):
        logits = model.logits(part).float()
        log_likelihoods.append(-cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(log_likelihoods).cpu(), torch.cat(greedy).cpu()
