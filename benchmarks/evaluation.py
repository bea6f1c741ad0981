"""Comparison of evaluation speed with lm-eval's `hf` model, with equal checkpoint, CPU, threads and dtype.

Both models run in one process, in turns. `hf` uses the best of several batch sizes; tinyllama's model forms its own
batches. The script measures the time of lm-eval's call to the model, from strings to log-likelihoods. It prints the
ratio of the times with its range, in total and per task, and the largest difference between the log-likelihoods.

    python benchmarks/evaluation.py --precision fp32 --items 60 --rounds 3
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from evaluation_model import answers, load_ours, load_task, load_theirs, requests_of, smollm2_folder
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from measuring import OURS, Measure, Program, options, spread, take_turns, write_measures
from peers import version_of

from tinyllama.hardware import available_cpu_count

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge")
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BATCH_SIZES = (1, 4, 16, 64)
TRIAL_ITEMS = 8

PEER = "lm-eval hf"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    requests = {name: requests_of(load_task(name), arguments.items) for name in TASKS}
    folder = smollm2_folder(arguments.work.resolve())
    compared = (_compare(folder, precision, requests, arguments) for precision in arguments.precision)
    write_measures(arguments.json, compared)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--items", type=int, default=60, help="items per task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cpu_count())
    return parser.parse_args()


def _compare(
    folder: Path, precision: str, requests: Mapping[str, list[Instance]], given: argparse.Namespace
) -> Measure:
    theirs, settings = _with_best_batch(folder, PRECISIONS[precision], requests)
    models = {OURS: load_ours(folder, PRECISIONS[precision]), PEER: theirs}
    turns = take_turns({name: partial(Turn.of, model, requests) for name, model in models.items()}, given.rounds)
    for task in TASKS:
        pairs = zip(turns[OURS], turns[PEER], strict=True)
        print(f"  {task:<14} {spread(peer.seconds[task] / ours.seconds[task] for ours, peer in pairs)} times as fast")
    difference = _difference(turns[OURS][-1].scores, turns[PEER][-1].scores)
    described = {OURS: (OURS, "the model and the batches of `tinyllama evaluate`"), PEER: ("lm_eval", settings)}
    return Measure(
        section="evaluation",
        name=f"evaluation of SmolLM2-135M in {precision}",
        unit="s",
        more_is_better=False,
        how=f"{sum(map(len, requests.values()))} requests of {', '.join(TASKS)} ({given.items} items each), "
        f"with {given.threads} threads in one process. The time is that of lm-eval's call to the model, from input "
        "strings to log-likelihoods.",
        not_shown="Loading the model and the tasks; generation tasks; GPUs; tasks with a smaller speed-up, because "
        "their requests share less text than the choices of one question.",
        programs={
            name: Program(
                version=version_of(sys.executable, package),
                settings=settings,
                values=[sum(turn.seconds.values()) for turn in turns[name]],
                found=difference if name == OURS else "",
            )
            for name, (package, settings) in described.items()
        },
    )


class Turn(NamedTuple):
    """Time per task in seconds, and the log-likelihood and greedy flag of each request."""

    seconds: dict[str, float]
    scores: list[tuple[float, bool]]

    @classmethod
    def of(cls, model: LM, requests: Mapping[str, list[Instance]]) -> Self:
        return cls(*_time(model, requests))

    def __str__(self) -> str:
        return f"{sum(self.seconds.values()):.2f} s"


def _with_best_batch(folder: Path, precision: torch.dtype, requests: Mapping[str, list[Instance]]) -> tuple[LM, str]:
    """Return lm-eval's `hf` with the fastest batch size for a few items of each task, and its description."""
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
    print(f"hf, {dtype}: batch size {best} ({tried}); the smallest compared with the largest:")
    print(f"  {_difference(scores[0], scores[-1])}", flush=True)
    return model, f"`hf` on the CPU, batch size {best}, which was the fastest of {', '.join(map(str, BATCH_SIZES))}"


def _time(model: LM, requests: Mapping[str, list[Instance]]) -> tuple[dict[str, float], list[tuple[float, bool]]]:
    seconds: dict[str, float] = {}
    scores: list[tuple[float, bool]] = []
    for task, own in requests.items():
        began = time.perf_counter()
        scores += answers(model, own)
        seconds[task] = time.perf_counter() - began
    return seconds, scores


def _difference(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(abs(one[0] - other[0]) for one, other in pairs)
    relative = max(abs(one[0] - other[0]) / max(abs(other[0]), 1) for one, other in pairs)
    greedy = sum(one[1] != other[1] for one, other in pairs)
    return (
        f"log-likelihoods differ by at most {largest:.1e} nats (relative {relative:.1e}); "
        f"{greedy} `is_greedy` flags differ"
    )


if __name__ == "__main__":
    main()
