"""Models for lm-eval: `LlamaLM` for Llama 2, and lm-eval's own `hf` for any other causal model of transformers.

`LlamaLM` returns the same log-likelihoods as `hf` for the same weights. Under torchrun, each rank holds the complete
model, computes a share of the requests, and receives all results. lm-eval therefore sees one process. A task's requests
and few-shot examples do not depend on the world size.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tinyllama.distributed import World
from tinyllama.errors import InputError, first_line, silence_torchao
from tinyllama.evaluate.prefix_batching import BATCH_REQUESTS, Pair, PrefixGroup, form_batches, to_requests
from tinyllama.evaluate.scoring import LogLikelihood, score_batch
from tinyllama.evaluate.tasks import suppress_stderr
from tinyllama.loading import HuggingFaceLlama, indexed_files, load_model, load_tokenizer, resolve_model
from tinyllama.model.generation import generate
from tinyllama.model.llama import Llama
from tinyllama.progress import Bar, is_quiet
from tinyllama.tokenizer import Tokenizer

Result = TypeVar("Result")


def load_language_model(source: Path, batch_size: int, precision: torch.dtype, ranks: World) -> LM:
    """Load a run, checkpoint, release or Hugging Face folder as a language model of lm-eval on the rank's device.

    A Llama 2 becomes a `LlamaLM`, which ignores `batch_size`: its batches are always the same, because bf16 scores
    depend on the requests in a batch. lm-eval's `hf` runs any other causal model of transformers, including other kinds
    of Llama.
    """
    location = resolve_model(source)
    if not location.is_checkpoint:
        try:
            HuggingFaceLlama.open(location.folder)
        except InputError:  # not a Llama 2
            return DistributedLM(_load_hf(location.folder, batch_size, precision, ranks.device), ranks)
    tokenizer = load_tokenizer(source)
    bos_prefix = _bos_prefix(location.tokenizer_folder / "tokenizer.json", tokenizer)
    # a single cast produces the same numbers as a cast at each use
    model = load_model(source, precision).to(ranks.device, precision)
    return LlamaLM(model, tokenizer, BATCH_REQUESTS, bos_prefix, ranks)


def _load_hf(folder: Path, batch_size: int, precision: torch.dtype, device: torch.device) -> LM:
    silence_torchao()
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - imports transformers and accelerate
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    if is_quiet():
        logging.disable_progress_bar()

    with _translate_load_errors(folder, "tokenizer", "AutoTokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("word").input_ids:  # without its files, transformers creates an empty tokenizer
            raise ValueError("it returns no ids")
    with _translate_load_errors(folder, "causal model", "AutoModelForCausalLM"):
        if (index := folder / "model.safetensors.index.json").is_file():
            indexed_files(index)
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
            remedy = f"provide what {loader}.from_pretrained loads"
        raise InputError(f"{folder}: transformers cannot load the {what} ({first_line(error)}); {remedy}") from None


def _bos_prefix(file: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that start every text: BOS, unless the folder has a tokenizer.json that does not add BOS."""
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


def suppress_lm_eval_progress(model: LM, ranks: World) -> bool:
    """Return whether to suppress lm-eval's progress bars: LlamaLM has its own bar, and only rank 0 shows progress."""
    return isinstance(model, LlamaLM) or not ranks.is_main or is_quiet()


def truncated_request_counts(model: LM) -> dict[str, int]:
    """Return by task the number of requests that were truncated to the context; lm-eval's `hf` reports no number."""
    return dict(model.truncated) if isinstance(model, LlamaLM) else {}


class DistributedLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """A language model of lm-eval that is loaded on each rank; the ranks divide the requests among themselves."""

    def __init__(self, inner: LM, ranks: World) -> None:
        super().__init__()
        self.inner, self.ranks = inner, ranks

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
    """tinyllama's network as a model for lm-eval, whose interface determines the method names and parameters.

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
        """Return the ids of a text, after `bos_prefix` unless `add_special_tokens` is False."""
        ids = self.llama_tokenizer.encode(string)
        return ids if add_special_tokens is False else [*self.bos_prefix, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation after its context, and whether the continuation is greedy."""
        pairs = [self._encode_context_and_continuation(*request.args) for request in requests]
        context_length = self.model.config.context_length
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if len(continuation) > context_length:
                sizes = f"a continuation has {len(continuation)} tokens, the model's context holds {context_length}"
                raise InputError(f"{request.task_name}: {sizes}; skip this task")
            # the last id is predicted but not read, so a request may have one id more than the context length
            if len(context) + len(continuation) > context_length + 1:
                self.truncated[request.task_name or ""] += 1
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each complete text, in windows of the context; BOS is included, as in `hf`."""
        windows = []
        for request in requests:
            ids = self.tok_encode(*request.args)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.model.config.context_length, 1)
            windows.append(list(map(make_disjoint_window, rolling)))
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy completion of each context up to its first stop string."""
        return distribute(requests, self.ranks, lambda own: [self._complete(*request.args) for request in own])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[LogLikelihood]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _encode_context_and_continuation(self, context: str, continuation: str) -> Pair:
        """Encode a context and its continuation like lm-eval; a prefix token replaces an empty context."""
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
        """Return the scores of each batch by request number; rank 0 shows the progress."""
        total = sum(len(group.requests) for batch in batches for group in batch)
        scores, done = [], 0
        with (
            redirect_stderr(self.stderr),
            Bar("scoring", total, "requests") if self.ranks.is_main else nullcontext() as bar,
        ):
            for batch in batches:
                scores.append(score_batch(self.model, batch))
                done += len(scores[-1])
                if bar:
                    bar.show(done)
        return scores

    def _complete(self, context: str, options: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(options)
        if options["do_sample"]:
            raise InputError("a task samples its completions, only greedy ones can be scored; skip the task")
        max_prompt = max(1, self.model.config.context_length - options["max_gen_toks"])
        prompt = self.tok_encode(context)[-max_prompt:]
        ids: list[int] = []
        text = ""
        for token in generate(self.model, prompt, options["max_gen_toks"], stop_id=self.eot_token_id):
            ids.append(token)
            text = self.llama_tokenizer.decode(ids)
            if any(stop in text for stop in options["until"]):
                break
        completion: str = postprocess_generated_text(text, options["until"], None)
        return completion
