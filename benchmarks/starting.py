"""Comparison of start-up times: from the command to the end of the first step, `import`, and `--help`.

The first step uses the demo's shape, and an earlier turn has filled each program's cache of compiled code. Each program
runs in a new process, which is stopped after its first step. For `--help` there are fewer programs, because the Trainer
and torchtitan have no command that lists options.

    python benchmarks/starting.py
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from measuring import OURS, Measure, Program, options, seconds_of, take_turns, write_measures
from peers import make_peer, version_of
from training import COMMON, SETTINGS
from training_setup import VOCABULARY, Work, environment, make_work, peer_job, small_recipe, write_recipe

from tinyllama.hardware import available_cpu_count
from tinyllama.recipe import Recipe

HERE = Path(__file__).parent
FIRST_STEPS = {
    "litgpt": SETTINGS["litgpt bf16-true"],
    "transformers": SETTINGS["transformers bf16-mixed"],
    "torchtitan": SETTINGS["torchtitan bf16-mixed"],
}
IMPORTS = {OURS: "import tinyllama", "litgpt": "import litgpt", "transformers": "import transformers"}
TRAINING_IMPORTS = {
    OURS: "import tinyllama.train.loop",
    "litgpt": "import litgpt.pretrain",
    "transformers": "from transformers import LlamaForCausalLM, Trainer, TrainingArguments",
}
HELPS = {OURS: "tinyllama", "litgpt": "litgpt"}
LONGEST_SECONDS = 1800


def main() -> None:
    """Measure and print the tables."""
    parser = options(__doc__, rounds=3)
    parser.add_argument(
        "--threads", type=int, default=available_cpu_count(), help="threads of each program (default: %(default)s)"
    )
    arguments = parser.parse_args()
    work = make_work(arguments.work.resolve())
    pythons = {OURS: Path(sys.executable)} | {name: make_peer(work.folder, name) for name in FIRST_STEPS}
    write_measures(
        arguments.json,
        [first_steps(work, pythons, arguments), *imports(pythons, arguments.rounds), helps(pythons, arguments.rounds)],
    )


def first_steps(work: Work, pythons: Mapping[str, Path], arguments: argparse.Namespace) -> Measure:
    """Measure the time from the command to the end of the first step."""
    env = environment(work, arguments.threads)
    programs = {OURS: partial(start_ours, work, env)} | {
        name: partial(start_peer, work, env, pythons[name], name) for name in FIRST_STEPS
    }
    for program in programs.values():  # fills the caches of compiled code
        program()
    settings = {OURS: "`tinyllama train` with the demo's settings"} | {
        name: f"{COMMON[name]}; {', '.join(FIRST_STEPS[name].values())}" for name in FIRST_STEPS
    }
    shape = Recipe.load("demo").train
    how = (
        "The time from the start of a new process to the end of its first step, with compiled code from the cache. The "
        f"model has the demo's shape (vocabulary {VOCABULARY:,}, untied embeddings), and a step has "
        f"{shape.batch_sequences} x {shape.sequence_length} tokens."
    )
    return measure(
        "command to the end of the first step",
        how,
        "The first start, which compiles for about ten seconds; many ranks; large models, where loading the "
        "weights takes most of the time.",
        {name: (version_of(pythons[name], name), settings[name]) for name in programs},
        take_turns(programs, arguments.rounds),
    )


def demo_fields(work: Work) -> dict[str, Any]:
    """Return a recipe of two steps with the demo's shape, untied embeddings and the benchmarks' data."""
    demo = Recipe.load("demo").model_dump(mode="json")
    train = demo["train"] | {"tokens": 2 * demo["train"]["batch_sequences"] * demo["train"]["sequence_length"]}
    train["schedule"]["warmup_steps"] = 1
    model = demo["model"] | {"tie_embeddings": False}  # supported by all programs
    return small_recipe(work, 2) | {"model": model, "train": train}


def start_ours(work: Work, env: Mapping[str, str]) -> float:
    """Return the time to the first row of metrics, in seconds."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-starting-") as folder:
        recipe = write_recipe(Path(folder) / "recipe.yaml", demo_fields(work))
        command = [sys.executable, "-m", "tinyllama", "train", recipe.name]
        metrics = Path(folder) / "runs" / "training" / "metrics.jsonl"
        return wait(command, Path(folder), env, lambda: metrics.is_file() and b"\n" in metrics.read_bytes())


def start_peer(work: Work, env: Mapping[str, str], python: Path, name: str) -> float:
    """Return the time to the end of the first optimizer step, in seconds; a hook of torch reports the end."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-starting-") as folder:
        job = peer_job(work, Path(folder), demo_fields(work), FIRST_STEPS[name])
        command = [str(python), str(HERE / "training_peers.py"), name, str(job)]
        return wait(command, Path(folder), env, (Path(folder) / "first-step").exists)


def wait(command: list[str], folder: Path, env: Mapping[str, str], ready: Callable[[], bool]) -> float:
    """Return the time of a process until a condition holds, in seconds; then stop the process."""
    begun = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=dict(env), stdout=log, stderr=log)
    while not ready():
        if process.poll() is not None or time.perf_counter() - begun > LONGEST_SECONDS:
            process.kill()
            raise SystemExit(f"{' '.join(command)}: no first step\n{(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    process.kill()
    process.wait()
    return seconds


def imports(pythons: Mapping[str, Path], rounds: int) -> list[Measure]:
    """Measure imports in a new Python: of the package, which may be lazy, and of its training modules."""
    first = "Deferred imports: tinyllama and transformers import torch only when it is first needed."
    kinds = (
        ("import", IMPORTS, first),
        ("import of the training code", TRAINING_IMPORTS, "Imports during the first step."),
    )
    return [
        measure(
            name,
            "The time of a new Python process that imports the package, with a warm page cache.",
            not_shown,
            {program: (version_of(pythons[program], program), f"`{words}`") for program, words in statements.items()},
            take_turns(
                {program: partial(run, [str(pythons[program]), "-c", words]) for program, words in statements.items()},
                rounds,
            ),
        )
        for name, statements, not_shown in kinds
    ]


def helps(pythons: Mapping[str, Path], rounds: int) -> Measure:
    """Measure the time of the command with --help."""
    commands = {name: str(pythons[name].parent / command) for name, command in HELPS.items()}
    programs = {name: partial(run, [command, "--help"]) for name, command in commands.items()}
    return measure(
        "`--help`",
        "The time of the command with `--help`, with a warm page cache.",
        "Differences in the amount of help text.",
        {name: (version_of(pythons[name], name), f"`{command} --help`") for name, command in HELPS.items()},
        take_turns(programs, rounds),
    )


def run(command: list[str]) -> float:
    """Return the time of a process, in seconds."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return seconds_of(lambda: subprocess.run(command, check=True, **quiet))


def measure(
    name: str, how: str, not_shown: str, described: Mapping[str, tuple[str, str]], seconds: Mapping[str, list[float]]
) -> Measure:
    """Return the measure of the times of each program."""
    return Measure(
        section="starting",
        name=name,
        unit="s",
        more_is_better=False,
        how=how,
        not_shown=not_shown,
        programs={
            program: Program(version=described[program][0], settings=described[program][1], values=values)
            for program, values in seconds.items()
        },
    )


if __name__ == "__main__":
    main()
