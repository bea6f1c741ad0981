"""lm-eval's metrics of a model, and the bits per byte of correct continuations, from the same log-likelihoods."""

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
"""Metrics of one task by name."""


def compute_scores(
    model: LM, tasks: Mapping[str, Task], limit: int | None, silent: bool = True
) -> dict[str, MetricRow]:
    """Return by task every metric as a fraction, its standard error, bits per byte, and the numbers of items.

    `silent` suppresses lm-eval's progress bars.
    """
    with suppress_stderr() if silent else nullcontext():
        results = lm_eval.evaluate(model, {"tasks": dict(tasks)}, limit=limit, log_samples=False)
        rows = {}
        for name, task in tasks.items():
            metrics, items = results["results"][name], results["n-samples"][name]
            row = {_normalize_metric_name(key): value for key, value in metrics.items() if isinstance(value, float)}
            row |= {"items": items["effective"], "total_items": items["original"]}
            rows[name] = row | bits_per_byte(task)
        return rows


def _normalize_metric_name(name: str) -> str:
    """Rename lm-eval's `metric_stderr,filter`: `_stderr` goes to the end, and the filter `none` is removed."""
    metric, _, filter_name = name.partition(",")
    is_error, metric = metric.endswith("_stderr"), metric.removesuffix("_stderr")
    return metric + (f",{filter_name}" if filter_name not in ("", "none") else "") + ("_stderr" if is_error else "")


def bits_per_byte(task: Task) -> MetricRow:
    """Return the model's bits per byte on the correct continuations of a task that has been scored.

    The value is the sum over items of the continuation's negative log-likelihood in bits, divided by the sum of its
    UTF-8 bytes. The space before a continuation counts, since the model predicts this space. If an item has several
    correct continuations, the first is used. The standard error is computed for a ratio of sums over items (Cochran,
    Sampling Techniques, 1977, section 6.4). The row is empty for tasks without correct continuations, such as
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


def _correct_continuations(task: Task) -> Iterator[Instance]:
    """Yield the scored requests that hold the correct answer."""
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
