"""lm-eval's scores of a model, and the bits per byte of the right continuations, from the same log-likelihoods."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask, Task

from tinyllama.evaluate.tasks import suppress_stderr

MetricRow = dict[str, float]


def score(model: LM, tasks: Mapping[str, Task], limit: int | None, silent: bool = True) -> dict[str, MetricRow]:
    """Every metric of every task with its standard error, as shares of 1; bits per byte; and the numbers of items.

    `silent` keeps lm-eval's own bars back.
    """
    with suppress_stderr() if silent else nullcontext():
        results = lm_eval.evaluate(model, {"tasks": dict(tasks)}, limit=limit, log_samples=False)
        return {
            name: _row(results["results"][name], results["n-samples"][name]) | bits_per_byte(task)
            for name, task in tasks.items()
        }


def _row(metrics: Mapping[str, Any], items: Mapping[str, int]) -> MetricRow:
    numbers = {_normalize_metric_name(name): value for name, value in metrics.items() if isinstance(value, float)}
    return numbers | {"items": items["effective"], "total_items": items["original"]}


def _normalize_metric_name(name: str) -> str:
    """lm-eval's `metric_stderr,filter` with the error's mark at its end, and without a filter that is none."""
    metric, _, taken = name.partition(",")
    is_error, metric = metric.endswith("_stderr"), metric.removesuffix("_stderr")
    return metric + (f",{taken}" if taken not in ("", "none") else "") + ("_stderr" if is_error else "")


def bits_per_byte(task: Task) -> MetricRow:
    """Bits that the model needs for a byte of the right continuations of a task that has been scored.

    Over all items, the sum of the right continuation's negative log-likelihood after its context, in bits, by the sum
    of its UTF-8 bytes, with the space before it, which is predicted too. Of several right ones the first counts. The
    standard error is that of a ratio of sums over items (Cochran, Sampling Techniques, 1977, section 6.4). Nothing for
    tasks that have no right continuation to score, such as those that generate.
    """
    right = list(_right_continuations(task))
    if not right:
        return {}
    bits = np.array([-float(request.resps[0][0]) / math.log(2) for request in right])
    sizes = np.array([len(request.args[1].encode()) for request in right])
    ratio = float(bits.sum() / sizes.sum())
    row = {"bits_per_byte": ratio}
    if len(right) > 1:
        row["bits_per_byte_stderr"] = float(np.std(bits - ratio * sizes, ddof=1) / math.sqrt(len(right)) / sizes.mean())
    return row


def _right_continuations(task: Task) -> Iterator[Instance]:
    """The scored requests of a task that hold the right answer."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return
    right = {request.doc_id: _gold_index(task, request.doc) for request in task.instances if request.idx == 0}
    yield from (request for request in task.instances if request.idx == right[request.doc_id])


def _gold_index(task: ConfigurableTask, item: Any) -> int | None:
    """Number of the request that holds an item's right answer."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    # In tasks such as WinoGrande the choices differ in their contexts, and what follows is the same for all of them.
    answer = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    first = answer[0] if isinstance(answer, list) else answer
    choices = task.doc_to_choice(item)
    if isinstance(first, str):
        return choices.index(first) if first in choices else None
    return first if 0 <= first < len(choices) else None
