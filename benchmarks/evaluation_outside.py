"""Comparison of a pretrained model's scores with those of lm-eval's `hf` model, item by item, in fp32.

The exit status is 1 if acc or acc_norm of an item differs.

    python benchmarks/evaluation_outside.py --items 500
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from evaluation_model import answers, load_ours, load_task, load_theirs, requests_of, smollm2_folder
from lm_eval.api.model import LM
from lm_eval.api.task import Task

METRICS = ("acc", "acc_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="folder to keep the weights in, in Hugging Face's format")
    arguments = parser.parse_args()
    task = load_task(arguments.task)
    with tempfile.TemporaryDirectory() as directory:
        folder = smollm2_folder(arguments.folder or Path(directory))
        ours = by_item(task, load_ours(folder, torch.float32), arguments.items)
        theirs = by_item(task, load_theirs(folder, torch.float32, 16), arguments.items)
    differing = 0
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for metric in METRICS:
            if one[metric] != other[metric]:
                differing += 1
                print(f"item {number}: {metric} {one[metric]} here, {other[metric]} in lm-eval's hf")
    for metric in METRICS:
        means = [100 * statistics.mean(item[metric] for item in items) for items in (ours, theirs)]
        print(f"{arguments.task}, first {arguments.items} items: {metric} {means[0]:.2f} here, {means[1]:.2f} in hf")
    largest = max(
        abs(a - b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one["lls"], other["lls"], strict=True)
    )
    print(f"{differing} item scores differ; log-likelihoods by at most {largest:.1e} nats")
    sys.exit(differing > 0)


def by_item(task: Task, model: LM, items: int) -> list[dict[str, Any]]:
    """Return each item's metrics, and the log-likelihoods `lls` of its choices."""
    requests = requests_of(task, items)
    scores: dict[int, list[tuple[float, bool]]] = {}
    for request, score in zip(requests, answers(model, requests), strict=True):
        scores.setdefault(request.doc_id, []).append(score)
    docs = {request.doc_id: request.doc for request in requests}
    return [task.process_results(docs[number], own) | {"lls": [ll for ll, _ in own]} for number, own in scores.items()]


if __name__ == "__main__":
    main()
