"""Our network as a language model of lm-eval; any other of transformers through lm-eval's own `hf`.

Ours gives the log-likelihoods of `hf` on the same weights. Under torchrun each rank holds the whole model and computes
its share; then all of them know all results, so that lm-eval sees one process, and a task's requests, few-shot draws
included, are the same however many ranks there are.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from tinyllama.errors import InputError, first_line, silence_torchao
from tinyllama.evaluate.prefix_batching import BATCH_REQUESTS, Pair, PrefixGroup, form_batches, to_requests
from tinyllama.evaluate.scoring import Score, score_batch
from tinyllama.evaluate.tasks import suppress_stderr
from tinyllama.loading import HuggingFaceLlama, ModelLocation, indexed_files, load_model, load_tokenizer, resolve_model
from tinyllama.model.generation import generate
from tinyllama.model.llama import Llama
from tinyllama.progress import Bar, is_quiet
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.distributed import World

Result = TypeVar("Result")


def load_language_model(source: Path, batch_size: int, precision: torch.dtype, ranks: World) -> LM:
    """A run, checkpoint, release or Hugging Face folder as a language model of lm-eval, on the rank's device.

    A Llama 2 becomes `LlamaLM`, which has batches of its own: what is computed together moves scores in bf16. Any other
    causal model of transformers, Llamas of other kinds among them, goes through lm-eval's `hf`.
    """
    found = resolve_model(source)
    if not _is_ours(found):
        return DistributedLM(_load_hf(found, batch_size, precision, ranks.device), ranks)
    tokenizer = load_tokenizer(source)
    front = _bos_prefix(found.tokenizer_folder / "tokenizer.json", tokenizer)
    # Cast once instead of at each use: the same numbers.
    model = load_model(source, precision).to(ranks.device, precision)
    return LlamaLM(model, tokenizer, BATCH_REQUESTS, front, ranks)


def _is_ours(found: ModelLocation) -> bool:
    """Whether it is a checkpoint, or a Hugging Face folder that says it is a Llama 2."""
    if found.is_checkpoint:
        return True
    try:
        HuggingFaceLlama.open(found.folder)
    except InputError:
        return False
    return True


def _load_hf(found: ModelLocation, batch_size: int, precision: torch.dtype, device: torch.device) -> LM:
    silence_torchao()
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - imports transformers and accelerate
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    if is_quiet():
        logging.disable_progress_bar()

    with _translate_load_errors(found.folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(found.folder, trust_remote_code=False)
        if not tokenizer("word").input_ids:  # transformers makes an empty one where the files are missing
            raise ValueError("it gives no ids")
    with _translate_load_errors(found.folder, "causal model"):
        if (index := found.folder / "model.safetensors.index.json").is_file():
            indexed_files(index)
        model = AutoModelForCausalLM.from_pretrained(
            found.folder, dtype=precision, use_safetensors=True, trust_remote_code=False
        )
    with suppress_stderr():  # given loaded, lm-eval leaves the ranks to us, and says so at length
        return HFLM(model.to(device), tokenizer=tokenizer, batch_size=batch_size, trust_remote_code=False)


@contextmanager
def _translate_load_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn what transformers raises, which can be nearly anything, into a line."""
    try:
        yield
    except Exception as error:
        loader = "AutoTokenizer" if what == "tokenizer" else "AutoModelForCausalLM"
        remedy = f"put there what {loader}.from_pretrained loads"
        if isinstance(error, ImportError):
            remedy = "install what it needs"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError):
            remedy = "use a machine with more memory"
        raise InputError(f"{folder}: transformers loads no {what} here ({first_line(error)}); {remedy}") from None


def _bos_prefix(file: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids that every text begins with: `<s>`, unless a tokenizer.json is there and does not put it in front."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if not file.is_file():
        return start
    own = tokenizers.Tokenizer.from_file(str(file)).encode("").ids
    return [number for number in start if number in own]


def distribute(items: Sequence[Any], ranks: World, compute: Callable[[Sequence[Any]], list[Result]]) -> list[Result]:
    """What `compute` gives for all items, of which each rank computes every `count`th: the same list on all ranks."""
    if ranks.count == 1:
        return compute(items)
    shares: list[list[Result]] = [[]] * ranks.count
    dist.all_gather_object(shares, compute(items[ranks.rank :: ranks.count]))
    return [shares[number % ranks.count][number // ranks.count] for number in range(len(items))]


def suppress_lm_eval_progress(model: LM, ranks: World) -> bool:
    """Whether lm-eval's bars should be kept back: ours has one, and of several ranks one should speak, if any."""
    return isinstance(model, LlamaLM) or not ranks.is_main or is_quiet()


def shortened(model: LM) -> dict[str, int]:
    """By task, the requests that lost their beginning, being longer than the context; lm-eval's `hf` does not say."""
    return dict(model.shortened) if isinstance(model, LlamaLM) else {}


class DistributedLM(LM):  # type: ignore[misc]  # lm-eval's documented interface; it has no types
    """Another language model of lm-eval, of which each rank has one, with the requests shared out among them."""

    def __init__(self, inner: LM, ranks: World) -> None:
        super().__init__()
        self.inner, self.ranks = inner, ranks

    def loglikelihood(self, requests: list[Instance]) -> list[Score]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one."""
        return distribute(requests, self.ranks, self.inner.loglikelihood)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text."""
        return distribute(requests, self.ranks, self.inner.loglikelihood_rolling)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The completion of each context up to its first stop string."""
        return distribute(requests, self.ranks, self.inner.generate_until)


class LlamaLM(TemplateLM):  # type: ignore[misc]  # lm-eval's documented interface; it has no types
    """Our network behind lm-eval's interface, whose method names and arguments these are.

    `front` stands before every text: `<s>` for ours, for every document that they are trained on begins with it.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch_size: int, front: list[int], ranks: World) -> None:
        super().__init__()
        self.model, self.llama_tokenizer, self.batch_size, self.front = model, tokenizer, batch_size, front
        self.ranks = ranks
        self.shortened: Counter[str] = Counter()
        """By task, requests that lost their beginning, being longer than the context."""
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
        pairs = [self._encode(*request.args) for request in requests]
        context = self.model.shape.context_length
        for request, pair in zip(requests, pairs, strict=True):
            if len(pair[1]) > context:
                size = f"a continuation has {len(pair[1])} tokens, the model's context holds {context}"
                raise InputError(f"{request.task_name}: {size}; leave out this task")
            # The last id is only predicted, so one more than the context is still read whole.
            if sum(map(len, pair)) > context + 1:
                self.shortened[request.task_name or ""] += 1
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text in windows of the context; `<s>` counts, as in lm-eval's `hf`."""
        windows = [list(self._windows(*request.args)) for request in requests]
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The greedy completion of each context up to its first stop string."""
        return distribute(requests, self.ranks, lambda own: [self._complete(*request.args) for request in own])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Score]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _encode(self, context: str, continuation: str) -> Pair:
        """Ids of both, as lm-eval cuts them: a prefix token stands for an empty context."""
        before, after = self._encode_pair(context, continuation) if context else ([], self._ids(continuation))
        if before:
            return before, after
        prefix = self.prefix_token_id
        return (after[:1], after[1:]) if prefix is None or after[:1] == [prefix] else ([prefix], after)

    def _ids(self, text: str) -> list[int]:
        return self.tok_encode(text, add_special_tokens=False)

    def _windows(self, text: str) -> Iterable[Pair]:
        ids, context = self.tok_encode(text), self.model.shape.context_length
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, context, 1))

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        batches = form_batches(to_requests(pairs, self.model.shape.context_length), self.batch_size)
        scores: dict[int, Score] = {}
        for part in distribute(batches, self.ranks, self._score_batches):
            scores |= part
        return [scores[number] for number in range(len(pairs))]

    def _score_batches(self, batches: Sequence[list[PrefixGroup]]) -> list[dict[int, Score]]:
        """The scores of some batches, with a bar where this is the first rank."""
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
            raise InputError("a task samples its completions; leave it out, only tasks with greedy ones can be scored")
        room = max(1, self.model.shape.context_length - options["max_gen_toks"])
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
