"""How fast we score, beside lm-eval's own `hf` model on the same checkpoint, CPU, threads and dtype.

In one process, round by round, the one after the other in turns; `hf` with the best of some batch sizes, ours with its
own batches. What is timed is lm-eval's call of the model: tokens of the texts, the network, the scores. Prints the
ratio of times with its spread, also task by task, and the largest difference of the log-likelihoods.

    python benchmarks/evaluation.py --precision fp32 --items 60 --rounds 3
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from evaluation_model import answers, load_ours, load_task, load_theirs, requests_of, smollm2_folder
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_SIZES = (1, 4, 16, 64)
TRIAL_ITEMS = 8

Seconds = dict[str, float]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    requests = {name: requests_of(load_task(name), arguments.items) for name in TASKS}
    with tempfile.TemporaryDirectory() as directory:
        folder = smollm2_folder(arguments.folder or Path(directory))
        for precision in arguments.precision:
            _compare(folder, precision, requests, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--items", type=int, default=60, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="keep the Hugging Face folder of the weights here")
    return parser.parse_args()


def _compare(folder: Path, precision: str, requests: Mapping[str, list[Instance]], given: argparse.Namespace) -> None:
    models = {
        "ours": load_ours(folder, PRECISIONS[precision]),
        "hf": _with_best_batch(folder, PRECISIONS[precision], requests),
    }
    scores: dict[str, list[tuple[float, bool]]] = {}
    rounds: list[dict[str, Seconds]] = []
    for number in range(given.rounds):
        times: dict[str, Seconds] = {}
        for name in sorted(models, reverse=bool(number % 2)):
            times[name], scores[name] = _time(models[name], requests)
        rounds.append(times)
    count = sum(map(len, requests.values()))
    print(f"{precision}, {given.threads} threads, {given.items} items of each task, {count} requests:")
    for task in (*TASKS, "all"):
        print(f"  {task:<14} {_ratio(rounds, task)}")
    print(f"  {_difference(scores['ours'], scores['hf'])}", flush=True)


def _with_best_batch(folder: Path, precision: torch.dtype, requests: Mapping[str, list[Instance]]) -> LM:
    """lm-eval's `hf` with the batch size that is fastest on a few items of each task."""
    model = load_theirs(folder, precision, 1)
    few = {task: [request for request in own if request.doc_id < TRIAL_ITEMS] for task, own in requests.items()}
    seconds: dict[int, float] = {}
    scores: list[list[tuple[float, bool]]] = []
    for size in BATCH_SIZES:
        model.batch_size_per_gpu = size
        runs = [_time(model, few) for _ in range(2)]
        seconds[size] = min(sum(times.values()) for times, _ in runs)
        scores.append(runs[0][1])
    best = min(seconds, key=lambda size: seconds[size])
    model.batch_size_per_gpu = best
    tried = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
    dtype = str(precision).removeprefix("torch.")
    print(f"hf, {dtype}: batch size {best} ({tried}); the smallest and the largest beside each other:")
    print(f"  {_difference(scores[0], scores[-1])}", flush=True)
    return model


def _time(model: LM, requests: Mapping[str, list[Instance]]) -> tuple[Seconds, list[tuple[float, bool]]]:
    seconds: Seconds = {}
    scores: list[tuple[float, bool]] = []
    for task, own in requests.items():
        began = time.perf_counter()
        scores += answers(model, own)
        seconds[task] = time.perf_counter() - began
    return seconds, scores


def _ratio(rounds: Sequence[Mapping[str, Seconds]], task: str) -> str:
    """Times of both, and how many times as fast ours is: the median of the rounds' ratios, and their range."""

    def seconds(name: str) -> list[float]:
        return [sum(times[name].values()) if task == "all" else times[name][task] for times in rounds]

    ours, theirs = seconds("ours"), seconds("hf")
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    medians = f"ours {statistics.median(ours):.2f} s, hf {statistics.median(theirs):.2f} s"
    return f"{statistics.median(ratios):.2f} times as fast ({spread}): {medians}"


def _difference(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(abs(one[0] - other[0]) for one, other in pairs)
    relative = max(abs(one[0] - other[0]) / max(abs(other[0]), 1) for one, other in pairs)
    greedy = sum(one[1] != other[1] for one, other in pairs)
    return f"log-likelihoods differ by at most {largest:.1e} nats, {relative:.1e} of them; {greedy} greedy flags differ"


if __name__ == "__main__":
    main()
