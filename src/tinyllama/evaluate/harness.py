"""Models for lm-eval, and their scores. `LlamaLM` runs Llama models; lm-eval's own `hf` runs other causal models.

`LlamaLM` returns the same log-likelihoods as `hf` for the same weights. Under torchrun, each rank loads the complete
model, computes a share of the requests, and receives all results. For lm-eval, each rank therefore behaves like a
single process. A task's requests and few-shot examples do not depend on the world size.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import lm_eval
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tinyllama.distributed import World
from tinyllama.errors import InputError, UnsupportedModelError, first_line, silence_torchao
from tinyllama.evaluate.scoring import (
    BATCH_REQUESTS,
    LogLikelihood,
    Pair,
    PrefixGroup,
    form_batches,
    score_batch,
    to_requests,
)
from tinyllama.evaluate.tasks import suppress_stderr
from tinyllama.loading import HuggingFaceLlama, check_model_folder, load_model, load_tokenizer, resolve_model
from tinyllama.model.generation import generate
from tinyllama.model.llama import Llama
from tinyllama.progress import Bar, is_quiet
from tinyllama.tokenizer import Tokenizer

Result = TypeVar("Result")
MetricRow = dict[str, float]
"""Metrics of one task by name."""


def load_language_model(
    source: Path, batch_size: int, precision: torch.dtype, ranks: World
) -> "LlamaLM | DistributedLM":
    """Load a run, checkpoint, release or Hugging Face folder as a language model of lm-eval on the rank's device.

    A Llama model becomes a `LlamaLM`, which ignores `batch_size`: bf16 scores depend on which requests share a batch,
    so its batches are always the same. lm-eval's `hf` runs any other causal model of transformers, including Llamas
    that `model.llama` does not support, such as quantized ones. Raises InputError if the values in a Llama's
    config.json contradict each other, because transformers would use one of them without a message.
    """
    location = resolve_model(source)
    if not location.is_checkpoint:
        try:
            HuggingFaceLlama.open(location.folder)
        except UnsupportedModelError:
            return DistributedLM(_load_hf(location.folder, batch_size, precision, ranks.device), ranks)
    tokenizer = load_tokenizer(source)
    prefix = bos_prefix(location.tokenizer_folder / "tokenizer.json", tokenizer)
    # a single cast produces the same numbers as a cast at each use
    model = load_model(source, precision).to(ranks.device, precision)
    return LlamaLM(model, tokenizer, BATCH_REQUESTS, prefix, ranks)


def _load_hf(folder: Path, batch_size: int, precision: torch.dtype, device: torch.device) -> LM:
    silence_torchao()
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - imports transformers and accelerate
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    if is_quiet():
        logging.disable_progress_bar()

    check_model_folder(folder)
    with _translate_load_errors(folder, "tokenizer", "AutoTokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("word").input_ids:  # without its files, transformers creates an empty tokenizer
            raise ValueError("it returns no ids")
    with _translate_load_errors(folder, "causal model", "AutoModelForCausalLM"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=precision, use_safetensors=True, trust_remote_code=False
        )
    with suppress_stderr():  # lm-eval warns that it does not distribute a model that is already loaded
        return HFLM(model.to(device), tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


@contextmanager
def _translate_load_errors(folder: Path, what: str, loader: str) -> Iterator[None]:
    """Convert the exceptions of transformers, which have many types, into InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError):
            remedy = "install the missing library"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError):
            remedy = "use a machine with more memory"
        else:
            remedy = f"provide the files that {loader}.from_pretrained needs"
        raise InputError(f"{folder}: transformers cannot load the {what} ({first_line(error)}); {remedy}") from None


def bos_prefix(file: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids at the start of every text: BOS, unless the folder has a tokenizer.json that does not add BOS."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if not file.is_file():
        return bos
    added = tokenizers.Tokenizer.from_file(str(file)).encode("").ids
    return [token for token in bos if token in added]


def distribute(items: Sequence[Any], ranks: World, compute: Callable[[Sequence[Any]], list[Result]]) -> list[Result]:
    """Return the results of `compute` for all items in order, on all ranks; each rank computes a share of the items."""
    if ranks.size == 1:
        return compute(items)
    shares: list[list[Result]] = [[]] * ranks.size
    dist.all_gather_object(shares, compute(items[ranks.rank :: ranks.size]))
    return [shares[number % ranks.size][number // ranks.size] for number in range(len(items))]


class DistributedLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """A language model of lm-eval that is loaded on each rank; the ranks divide the requests among themselves."""

    def __init__(self, inner: LM, ranks: World) -> None:
        super().__init__()
        self.inner, self.ranks = inner, ranks
        self.truncated: Counter[str] = Counter()  # stays empty, because lm-eval's `hf` reports no truncation

    def loglikelihood(self, requests: list[Instance]) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation after its context, and whether the continuation is greedy."""
        return distribute(requests, self.ranks, self.inner.loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each complete text."""
        return distribute(requests, self.ranks, self.inner.loglikelihood_rolling)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the completion of each context up to its first stop string."""
        return distribute(requests, self.ranks, self.inner.generate_until)


class LlamaLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Adapter of `Llama` to lm-eval's model interface, which determines the names of methods and parameters.

    Every text starts with `bos_prefix`. For models of tinyllama, this prefix is BOS, since every training document
    starts with BOS.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, batch_size: int, bos_prefix: list[int], ranks: World
    ) -> None:
        super().__init__()
        self.model, self.llama_tokenizer, self.batch_size = model, tokenizer, batch_size
        self.bos_prefix, self.ranks = bos_prefix, ranks
        self.truncated: Counter[str] = Counter()
        """Number of requests per task that were truncated on the left to fit the context."""
        self.heartbeat: Callable[[], None] | None = None
        """Function that is called after each batch and each completion, instead of showing the progress."""
        self.encode_pair = cache(self._encode_context_and_continuation)  # the training loop repeats its requests
        self.stderr = sys.stderr  # progress is printed here, because `sys.stderr` is suppressed while lm-eval runs

    @property
    def eot_token_id(self) -> int | None:
        """Token id of EOS."""
        return self.llama_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """Token id that replaces an empty context: BOS, or EOS if there is no BOS."""
        bos_id = self.llama_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, preceded by `bos_prefix` unless `add_special_tokens` is False."""
        ids = self.llama_tokenizer.encode(string)
        return ids if add_special_tokens is False else [*self.bos_prefix, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation after its context, and whether the continuation is greedy."""
        for request in requests:
            self.check_request(request)
            context, continuation = self.encode_pair(*request.args)
            # the last id is a target but not an input, so a request may have one id more than the context length
            if len(context) + len(continuation) > self.model.config.context_length + 1:
                self.truncated[request.task_name or ""] += 1
        return self._score([self.encode_pair(*request.args) for request in requests])

    def check_request(self, request: Instance) -> None:
        """Raise InputError if the model cannot process the request of a task."""
        if request.request_type == "loglikelihood":
            length, context_length = len(self.encode_pair(*request.args)[1]), self.model.config.context_length
            if length > context_length:
                sizes = f"a continuation has {length} tokens, but the context length is {context_length}"
                raise InputError(f"{request.task_name}: {sizes}; skip this task")
        elif request.request_type == "generate_until" and normalize_gen_kwargs(request.args[1])["do_sample"]:
            problem = "needs sampled completions, but decoding is always greedy"
            raise InputError(f"{request.task_name}: {problem}; skip this task")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each complete text, split into windows; BOS is added as in `hf`."""
        windows = []
        for request in requests:
            ids = self.tok_encode(*request.args)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.model.config.context_length, 1)
            windows.append(list(map(make_disjoint_window, rolling)))
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy completion of each context up to its first stop string."""
        return distribute(requests, self.ranks, lambda own: [self._complete(request) for request in own])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[LogLikelihood]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _encode_context_and_continuation(self, context: str, continuation: str) -> Pair:
        """Encode a context and its continuation as lm-eval does; a prefix token replaces an empty context."""
        if context:
            context_ids, ids = self._encode_pair(context, continuation)
        else:
            context_ids, ids = [], self.tok_encode(continuation, add_special_tokens=False)
        if context_ids:
            return context_ids, ids
        prefix = self.prefix_token_id
        return (ids[:1], ids[1:]) if prefix is None or ids[:1] == [prefix] else ([prefix], ids)

    def _score(self, pairs: Sequence[Pair]) -> list[LogLikelihood]:
        batches = form_batches(to_requests(pairs, self.model.config.context_length), self.batch_size)
        scores: dict[int, LogLikelihood] = {}
        for of_batch in distribute(batches, self.ranks, self._score_batches):
            scores |= of_batch
        return [scores[number] for number in range(len(pairs))]

    def _score_batches(self, batches: Sequence[list[PrefixGroup]]) -> list[dict[int, LogLikelihood]]:
        """Return the scores of each batch by request number; without `heartbeat`, rank 0 shows the progress."""
        shows_progress = self.ranks.is_main and self.heartbeat is None
        total = sum(len(group.requests) for batch in batches for group in batch)
        scores, done = [], 0
        with (
            redirect_stderr(self.stderr),
            Bar("scoring", total, "requests") if shows_progress else nullcontext() as bar,
        ):
            for batch in batches:
                scores.append(score_batch(self.model, batch))
                done += len(scores[-1])
                if bar:
                    bar.show(done)
                if self.heartbeat:
                    self.heartbeat()
        return scores

    def _complete(self, request: Instance) -> str:
        self.check_request(request)
        context, options = request.args[0], normalize_gen_kwargs(request.args[1])
        max_prompt = max(1, self.model.config.context_length - options["max_gen_toks"])
        prompt, text = self.tok_encode(context)[-max_prompt:], ""
        ids: list[int] = []
        for token in generate(self.model, prompt, options["max_gen_toks"], stop_id=self.eot_token_id):
            ids.append(token)
            text = self.llama_tokenizer.decode(ids)
            if any(stop in text for stop in options["until"]):
                break
        if self.heartbeat:
            self.heartbeat()
        completion: str = postprocess_generated_text(text, options["until"], None)
        return completion


def build_requests(model: LlamaLM, tasks: Mapping[str, Task], limit: int | None) -> None:
    """Build and check the requests of tasks that are scored several times, so that later scoring does not repeat this.

    Raises InputError if the model cannot process a request.
    """
    with suppress_stderr():
        for task in tasks.values():
            task.build_all_requests(limit=limit)
            task.build_all_requests = partial(_delete_responses, task)
            for request in task.instances:
                model.check_request(request)


def _delete_responses(task: Task, **_: Any) -> None:
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}


def compute_scores(
    model: LlamaLM | DistributedLM, tasks: Mapping[str, Task], limit: int | None
) -> dict[str, MetricRow]:
    """Score the tasks; return each task's metrics with standard errors, bits per byte, chance and numbers of items."""
    shows_progress = isinstance(model, DistributedLM) and model.ranks.is_main and not is_quiet()
    # LlamaLM prints its own progress. lm-eval prints on standard output when it bootstraps a standard error.
    with redirect_stdout(StringIO()), nullcontext() if shows_progress else suppress_stderr():
        results = lm_eval.evaluate(model, {"tasks": dict(tasks)}, limit=limit, log_samples=False)
        rows = {}
        for name, task in tasks.items():
            metrics, items = results["results"][name], results["n-samples"][name]
            row = {_normalize_metric_name(key): value for key, value in metrics.items() if isinstance(value, float)}
            row |= {"items": items["effective"], "total_items": items["original"]}
            rows[name] = row | bits_per_byte(task) | chance(task)
        return rows


def _normalize_metric_name(name: str) -> str:
    """Convert lm-eval's `metric_stderr,filter` to `metric,filter_stderr`; the filter `none` is removed."""
    metric, _, filter_name = name.partition(",")
    is_error, metric = metric.endswith("_stderr"), metric.removesuffix("_stderr")
    return metric + (f",{filter_name}" if filter_name not in ("", "none") else "") + ("_stderr" if is_error else "")


def bits_per_byte(task: Task) -> MetricRow:
    """Return the model's bits per byte on the correct continuations of a scored task.

    The value is the total negative log-likelihood of these continuations in bits, divided by their total number of
    UTF-8 bytes. The space before a continuation counts, since the model predicts this space. If an item has several
    correct continuations, the first is used. The standard error is that of a ratio of sums over items (Cochran,
    Sampling Techniques, 1977, section 6.4). The result is empty for tasks without correct continuations, such as
    generation tasks.
    """
    correct = list(_correct_continuations(task))
    if not correct:
        return {}
    bits = np.array([-float(request.resps[0][0]) / math.log(2) for request in correct])
    sizes = np.array([len(request.args[1].encode()) for request in correct])
    ratio = float(bits.sum() / sizes.sum())
    row = {"bits_per_byte": ratio}
    if len(correct) > 1:
        deviation = float(np.std(bits - ratio * sizes, ddof=1))
        row["bits_per_byte_stderr"] = deviation / math.sqrt(len(correct)) / float(sizes.mean())
    return row


def chance(task: Task) -> MetricRow:
    """Return the expected accuracy of a random choice; empty for tasks without choices.

    The value is a mean over the items, because the items of a task such as ARC have different numbers of choices.
    """
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return {}
    choices = [len(task.doc_to_choice(request.doc)) for request in task.instances if request.idx == 0]
    return {"chance": float(np.mean(1 / np.array(choices)))}


def _correct_continuations(task: Task) -> Iterator[Instance]:
    """Yield, for each item, the scored request that has the correct answer."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return
    gold = {request.doc_id: _gold_index(task, request.doc) for request in task.instances if request.idx == 0}
    yield from (request for request in task.instances if request.idx == gold[request.doc_id])


def _gold_index(task: ConfigurableTask, item: Any) -> int | None:
    """Return the index of the request with an item's correct answer, or None if no request has it."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    # In tasks such as WinoGrande the choices are contexts, and all of them have the same continuation.
    answer = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    first = answer[0] if isinstance(answer, list) else answer
    choices = task.doc_to_choice(item)
    if isinstance(first, str):
        return choices.index(first) if first in choices else None
    return first if 0 <= first < len(choices) else None
