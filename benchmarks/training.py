"""Comparison of `tinyllama train` with litgpt, the Hugging Face Trainer and torchtitan on this machine's CPU.

The model ("shape small") is a Llama with 55M parameters, trained in bf16 on 8 rows of 512 tokens per step. All programs
get the same rows of real text, the same number of threads, and the same settings of torch and the allocator. Each peer
uses the fastest of its settings. The programs take turns, so that other jobs slow all equally. Each program measures a
bf16 2048^3 matrix product between its steps, and its MFU is relative to the fastest product so far. Peers are installed
under --work.

    python benchmarks/training.py
    python benchmarks/training.py --busy        # with another busy process on the machine
    python benchmarks/training.py --ranks       # two ranks with one thread each, and one process with two threads
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from measuring import OURS, Measure, options, take_turns, write_measures
from measuring import Program as Recorded
from peers import PEERS, make_peer, version_of
from training_setup import Work, busy_process, environment, make_work, peer_job, run_logged, small_recipe, write_recipe

from tinyllama.hardware import available_cpu_count

HERE = Path(__file__).parent
# Settings by name; the first word of a name is the peer. SETTINGS has the fastest settings per precision. The slower
# settings in OTHER_SETTINGS run only if --only names them.
SETTINGS: dict[str, dict[str, str]] = {
    "litgpt bf16-mixed": {"precision": "bf16-mixed"},
    "litgpt bf16-true": {"precision": "bf16-true"},
    "transformers bf16-mixed": {"precision": "bf16-mixed", "attention": "eager"},
    "torchtitan bf16-mixed": {"precision": "bf16-mixed"},
}
OTHER_SETTINGS: dict[str, dict[str, str]] = {
    "litgpt bf16-mixed, its AdamW": {"precision": "bf16-mixed", "optimizer": "torch.optim.AdamW"},
    "litgpt bf16-mixed, math attention": {"precision": "bf16-mixed", "attention": "math"},
    "litgpt bf16-true, its AdamW": {"precision": "bf16-true", "optimizer": "torch.optim.AdamW"},
    "litgpt bf16-true, math attention": {"precision": "bf16-true", "attention": "math"},
    "transformers bf16-mixed, sdpa": {"precision": "bf16-mixed", "attention": "sdpa"},
    "transformers bf16-mixed, sdpa, max-autotune": {
        "precision": "bf16-mixed",
        "attention": "sdpa",
        "compile_mode": "max-autotune-no-cudagraphs",
    },
    "transformers bf16-true": {"precision": "bf16-true", "attention": "eager"},
    "transformers bf16-true, sdpa": {"precision": "bf16-true", "attention": "sdpa"},
    "torchtitan bf16-mixed, complex rope": {"precision": "bf16-mixed", "rope": "ComplexRoPE"},
    "torchtitan bf16-mixed, chunked loss": {"precision": "bf16-mixed", "loss": "chunked"},
    "torchtitan bf16-mixed, math attention": {"precision": "bf16-mixed", "attention": "math"},
    "torchtitan bf16-true": {"precision": "bf16-true"},
}
NAMES = "; ".join([*SETTINGS, *OTHER_SETTINGS])
PRODUCT = "the fastest bf16 2048^3 matrix product that was measured between the steps so far"
RANK_SETTINGS = {OURS: (1, 2), "two ranks, a thread each": (2, 1)}
COMMON = {
    "litgpt": "the function that `litgpt pretrain` calls, compiled, fused AdamW; with bf16-true its weights are bf16, "
    "whereas those of tinyllama are float32",
    "transformers": "Trainer with LlamaForCausalLM, torch_compile, adamw_torch_fused",
    "torchtitan": "torchtitan.train with a llama3 model, compiled, one gloo rank",
}


class Measured(NamedTuple):
    """Medians over the steps of a run after the warm-up, and the peak memory of the run."""

    tokens_per_second: float
    mfu: float
    memory_bytes: int


Program = Callable[[Path], None]
"""Function that trains in an empty folder and writes metrics.jsonl there or in its runs/training."""


def main() -> None:
    """Print the tables, and write the measures to the file of --json."""
    arguments = parse_arguments()
    work = make_work(arguments.work.resolve())
    programs = make_ranks(work, arguments) if arguments.ranks else make_programs(work, arguments)
    turns = {name: partial(run, program, arguments) for name, program in programs.items()}
    measures = as_measures(take_turns(turns, arguments.rounds), partial(described, work), arguments)
    write_measures(arguments.json, measures)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps per turn (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=4, help="first steps that are not measured (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=available_cpu_count(), help="threads of each program (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"{OURS}, a peer, or one of its settings: {NAMES}")
    parser.add_argument("--busy", action="store_true", help="run another busy process next to each program")
    parser.add_argument("--ranks", action="store_true", help="compare two ranks with one process, for tinyllama only")
    return parser.parse_args()


def make_programs(work: Work, arguments: argparse.Namespace) -> dict[str, Program]:
    """Return the functions that run tinyllama and its peers, and install the peers."""
    programs: dict[str, Program] = {OURS: partial(train, work, arguments.steps, 1, arguments.threads)}
    for name, settings in (SETTINGS | OTHER_SETTINGS).items():
        programs[name] = partial(train_peer, work, arguments, name.split()[0], settings)
    wanted = arguments.only or [OURS, *SETTINGS]
    chosen = [name for name in programs if name in wanted or (name in SETTINGS and name.split()[0] in wanted)]
    if unknown := set(wanted) - {name.split()[0] for name in programs} - programs.keys():
        raise SystemExit(f"--only {unknown.pop()!r}: no such program; known are {OURS}, {NAMES}")
    for peer in {name.split()[0] for name in chosen} & PEERS.keys():
        make_peer(work.folder, peer)
    return {name: programs[name] for name in chosen}


def make_ranks(work: Work, arguments: argparse.Namespace) -> dict[str, Program]:
    """Return the functions that run tinyllama in one process and as two ranks."""
    return {name: partial(train, work, arguments.steps, *counts) for name, counts in RANK_SETTINGS.items()}


def train(work: Work, steps: int, ranks: int, threads: int, folder: Path) -> None:
    """Run `tinyllama train`, with torchrun for several ranks."""
    recipe = write_recipe(folder / "recipe.yaml", small_recipe(work, steps))
    module: list[str | Path] = ["-m", "tinyllama", "train", recipe]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command: list[str | Path] = [sys.executable, *(torchrun if ranks > 1 else []), *module]
    run_logged(command, folder / "log", folder, environment(work, threads))


def train_peer(work: Work, arguments: argparse.Namespace, peer: str, settings: Mapping[str, str], folder: Path) -> None:
    """Run a peer on the rows that tinyllama reads."""
    job = peer_job(work, folder, small_recipe(work, arguments.steps), settings)
    command: list[str | Path] = [make_peer(work.folder, peer), HERE / "training_peers.py", peer, job]
    run_logged(command, folder / "log", folder, environment(work, arguments.threads))


def run(program: Program, arguments: argparse.Namespace) -> Measured:
    """Run one turn of a program."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-training-") as folder:
        with busy_process() if arguments.busy else nullcontext():
            program(Path(folder))
        return measured(Path(folder), arguments.steps, arguments.warmup)


def measured(folder: Path, steps: int, warmup: int) -> Measured:
    """Return the medians of a run's metrics."""
    (path,) = [*folder.glob("metrics.jsonl"), *folder.glob("runs/*/metrics.jsonl")]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows or rows[-1]["step"] != steps:
        raise RuntimeError(f"{len(rows)} rows of metrics instead of {steps}")
    rows = [row for row in rows if row["step"] > warmup]
    speed, mfu = (statistics.median(row[column] for row in rows) for column in ("tokens_per_second", "mfu"))
    return Measured(speed, mfu, max(row["memory_bytes"] for row in rows))


def described(work: Work, name: str) -> tuple[str, str]:
    """Return a program's version and settings."""
    if name == OURS or name in RANK_SETTINGS:
        return version_of(
            sys.executable, OURS
        ), "the recipe's default settings, which are float32 weights, bf16 matrix products and compilation"
    settings = ", ".join(f"{key} {value}" for key, value in (SETTINGS | OTHER_SETTINGS)[name].items())
    peer = name.split(maxsplit=1)[0]
    return version_of(make_peer(work.folder, peer), peer), f"{COMMON[peer]}; {settings}"


def as_measures(
    turns: Mapping[str, Sequence[Measured]],
    describe: Callable[[str], tuple[str, str]],
    arguments: argparse.Namespace,
) -> list[Measure]:
    """Return the measures of speed, fraction of the machine's peak, and memory."""
    how = (
        "All programs train a Llama of 55M parameters on the same rows, 8 x 512 tokens per step, with "
        f"{arguments.threads} threads and the same settings of torch and glibc"
        f"{', next to another busy process' if arguments.busy else ''}. The value is the median of steps "
        f"{arguments.warmup + 1} to {arguments.steps} of each turn."
    )
    columns = {
        "tokens_per_second": ("training speed", "tokens/s", True, 1.0, ""),
        "mfu": ("training, MFU", "%", True, 100.0, f" MFU is relative to {PRODUCT}."),
        "memory_bytes": (
            "training, peak memory",
            "GB",
            False,
            1e-9,
            " For memory, the value is the peak resident memory of the process.",
        ),
    }
    described = {name: describe(name) for name in turns}
    return [
        Measure(
            section="training",
            name=name,
            unit=unit,
            more_is_better=more,
            how=how + also,
            not_shown="GPUs, several ranks, other sizes; compiling, saving and validating, which are "
            "not part of a step.",
            programs={
                program: Recorded(
                    version=described[program][0],
                    settings=described[program][1],
                    values=[factor * getattr(turn, column) for turn in own],
                )
                for program, own in turns.items()
            },
        )
        for column, (name, unit, more, factor, also) in columns.items()
    ]


if __name__ == "__main__":
    main()
