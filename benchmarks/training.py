"""How fast `tinyllama train` trains beside litgpt, the Hugging Face Trainer and torchtitan, on this machine's CPU.

Shape small: a Llama of 55M parameters, 8 rows of 512 tokens a step, bf16. All get the same rows of real text, threads,
torch and settings of glibc's allocator, each its own best settings, and take turns, so that neighbours slow all alike.
Each times a bf16 2048^3 product between its steps; an MFU is a share of that. Peers are installed under --work.

    python benchmarks/training.py
    python benchmarks/training.py --ranks       # two ranks of a thread each beside one process of two threads
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from training_setup import (
    DEFAULT_WORK,
    PEERS,
    VOCABULARY,
    Work,
    environment,
    make_peer,
    make_work,
    run_logged,
    small_recipe,
    write_recipe,
    write_rows,
)

from tinyllama import plan
from tinyllama.recipe import Recipe

HERE = Path(__file__).parent
OURS = "tinyllama"
# A name's first word is the peer. Of each precision the fastest settings, and those that they were chosen from, which
# run where --only names them.
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
RANK_SETTINGS = {"two ranks, a thread each": (2, 1), "one process, two threads": (1, 2)}


class Measured(NamedTuple):
    """Of one run's steps, the warm-up's left out: medians, and the most memory."""

    tokens_per_second: float
    mfu: float
    memory_bytes: int


Program = Callable[[Path], None]
"""Trains in an empty folder; leaves metrics.jsonl there or in its runs/training."""


def main() -> None:
    """Print the table, and write it where --json says."""
    arguments = parse_arguments()
    work = make_work(arguments.work.resolve())
    programs = make_ranks(work, arguments) if arguments.ranks else make_programs(work, arguments)
    facts = describe(work, arguments, programs)
    runs, failures = take_turns(programs, arguments)
    print_table(runs, facts["versions"])
    for name, reason in failures.items():
        print(f"{name}: failed: {reason}")
    if arguments.json:
        figures = {name: {turn: measured._asdict() for turn, measured in turns.items()} for name, turns in runs.items()}
        arguments.json.write_text(json.dumps({**facts, "rounds": figures, "failures": failures}, indent=1) + "\n")
    if failures:
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps a turn (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="of them not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each program (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"{OURS}, a peer, or one of its settings: {NAMES}")
    parser.add_argument("--ranks", action="store_true", help="two ranks beside one process, tinyllama alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def make_programs(work: Work, arguments: argparse.Namespace) -> dict[str, Program]:
    """tinyllama and its peers."""
    programs: dict[str, Program] = {OURS: partial(train, work, arguments.steps, 1, arguments.threads)}
    for name, settings in (SETTINGS | OTHER_SETTINGS).items():
        programs[name] = partial(train_peer, work, arguments, name.split()[0], settings)
    wanted = arguments.only or [OURS, *SETTINGS]
    chosen = [name for name in programs if name in wanted or (name in SETTINGS and name.split()[0] in wanted)]
    if unknown := set(wanted) - {OURS, *PEERS, *programs}:
        raise SystemExit(f"--only {unknown.pop()!r}: no such program; there are {OURS}, {NAMES}")
    for peer in {name.split()[0] for name in chosen} & PEERS.keys():
        make_peer(work.folder, peer)
    return {name: programs[name] for name in chosen}


def make_ranks(work: Work, arguments: argparse.Namespace) -> dict[str, Program]:
    """tinyllama in one process and as two ranks."""
    return {name: partial(train, work, arguments.steps, *counts) for name, counts in RANK_SETTINGS.items()}


def train(work: Work, steps: int, ranks: int, threads: int, folder: Path) -> None:
    """`tinyllama train`, under torchrun where there are several ranks."""
    recipe = write_recipe(folder / "recipe.yaml", small_recipe(work, steps))
    module: list[str | Path] = ["-m", "tinyllama", "train", recipe]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command: list[str | Path] = [sys.executable, *(torchrun if ranks > 1 else []), *module]
    run_logged(command, folder / "log", folder, environment(work, threads))


def train_peer(work: Work, arguments: argparse.Namespace, peer: str, settings: Mapping[str, str], folder: Path) -> None:
    """A peer on the rows that tinyllama reads."""
    recipe = Recipe.load(write_recipe(folder / "recipe.yaml", small_recipe(work, arguments.steps)))
    model = recipe.model
    job = {
        **model.model_dump(),
        **settings,
        "vocab_size": VOCABULARY,
        "tokenizer": str(work.tokenizer),
        "rows": str(write_rows(folder / "rows.npy", recipe)),
        "steps": recipe.train.steps,
        "batch_sequences": recipe.train.batch_sequences,
        "sequence_length": recipe.train.sequence_length,
        "learning_rate": recipe.train.optimizer.learning_rate,
        "product_every_steps": recipe.train.validate_every_steps,
        "num_parameters": plan.num_parameters(model, VOCABULARY),
        "flops_per_token": plan.flops_per_token(model, VOCABULARY, recipe.train.sequence_length),
    }
    (folder / "job.json").write_text(json.dumps(job))
    command: list[str | Path] = [make_peer(work.folder, peer), HERE / "training_peers.py", peer, folder / "job.json"]
    run_logged(command, folder / "log", folder, environment(work, arguments.threads))


def describe(work: Work, arguments: argparse.Namespace, programs: Iterable[str]) -> dict[str, Any]:
    """Print what all have in common; return that and each program's version."""
    model = Recipe.load(write_recipe(work.folder / "training.yaml", small_recipe(work, 1))).model
    facts = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": version("torch"),
        "parameters": plan.num_parameters(model, VOCABULARY),
        "flops_per_token": plan.flops_per_token(model, VOCABULARY, model.context),
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "arguments"), flush=True)
    versions = {name: OURS if name in RANK_SETTINGS else name.split()[0] for name in programs}
    return facts | {"versions": {name: versions_of(work, peer) for name, peer in versions.items()}}


def versions_of(work: Work, program: str) -> str:
    """A program's version, as the Python that runs it says."""
    python = make_peer(work.folder, program) if program in PEERS else sys.executable
    command = [python, "-c", f"from importlib.metadata import version; print(version({program!r}))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def take_turns(
    programs: Mapping[str, Program], arguments: argparse.Namespace
) -> tuple[dict[str, dict[int, Measured]], dict[str, str]]:
    """Each program's figures by round, and why a program failed; one that did is left out from then on."""
    runs: dict[str, dict[int, Measured]] = {name: {} for name in programs}
    failures: dict[str, str] = {}
    for turn in range(arguments.rounds):
        for name in [name for name in programs if name not in failures]:
            with tempfile.TemporaryDirectory(prefix="tinyllama-training-") as folder:
                try:
                    programs[name](Path(folder))
                    runs[name][turn] = measured(Path(folder), arguments.steps, arguments.warmup)
                except RuntimeError as error:
                    failures[name] = str(error)
            print(f"round {turn + 1}: {name}: {runs[name].get(turn, 'failed')}", file=sys.stderr, flush=True)
    return runs, failures


def measured(folder: Path, steps: int, warmup: int) -> Measured:
    """What a run's rows of metrics say."""
    (path,) = [*folder.glob("metrics.jsonl"), *folder.glob("runs/*/metrics.jsonl")]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows or rows[-1]["step"] != steps:
        raise RuntimeError(f"{len(rows)} rows of metrics where {steps} steps were asked for")
    rows = [row for row in rows if row["step"] > warmup]
    speed, mfu = (statistics.median(row[column] for row in rows) for column in ("tokens_per_second", "mfu"))
    return Measured(speed, mfu, max(row["memory_bytes"] for row in rows))


def print_table(runs: Mapping[str, Mapping[int, Measured]], versions: Mapping[str, str]) -> None:
    """A line a program; the first is what the others are compared with, round by round."""
    names = [name for name, turns in runs.items() if turns]
    width = max(map(len, names), default=0)
    for name in names:
        speeds, mfus, memory = zip(*runs[name].values(), strict=True)
        line = f"  {name:{width}}  {versions[name]:8} {spread(speeds, ',.0f')} tokens/s, MFU {spread(mfus, '.1%')}"
        line += f", {max(memory) / 1e9:.1f} GB"
        shared = sorted(runs[names[0]].keys() & runs[name].keys())
        if shared and name != names[0]:
            for label, column in (("tokens/s", "tokens_per_second"), ("MFU", "mfu")):
                ratios = [getattr(runs[names[0]][turn], column) / getattr(runs[name][turn], column) for turn in shared]
                line += f"; {names[0]} / it {spread(ratios, '.2f')} by {label}"
        print(line)


def spread(values: Iterable[float], form: str) -> str:
    """Median, and from least to most where there are several."""
    ordered = sorted(values)
    middle = format(statistics.median(ordered), form)
    return f"{middle} ({ordered[0]:{form}}-{ordered[-1]:{form}})" if len(ordered) > 1 else middle


if __name__ == "__main__":
    main()
