"""Comparison with litdata of the time to the first batch when resuming at 90 % of an epoch, for several data sizes.

The script writes random tokens as a token store and as litdata's chunks. For each program, one process reads two epochs
and saves its state at 90 % of the first epoch, as the program's documentation describes. Then new processes load only
that state and read the first batch, in turns. The script compares the batch, and all later rows of the two epochs, with
those of the first process. The time of tinyllama is also measured at 90 % of a sparse store of 1e12 tokens. Linux only.

    python benchmarks/resuming.py --megatokens 20 200
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from loading import LENGTH, ROWS, VOCABULARY, write_chunks, write_random, write_sparse
from measuring import OURS, Measure, Program, number, options, take_turns, write_measures
from peers import make_peer, packages_of, version_of

from tinyllama.recipe import Recipe

HERE = Path(__file__).parent
SOURCE = "random"
NOT_SHOWN = (
    "Loading weights and optimizer state, which takes the same time in both; many ranks; a cold page cache; "
    "chunks that have to be downloaded again."
)


class First(NamedTuple):
    """The first batch of a resumed process."""

    seconds: float
    own_seconds: float
    """Time without the imports, in seconds."""
    rows: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, of which {self.own_seconds:.4f} s after the imports"


def main() -> None:
    """Print the time of each size, and whether the expected rows were read."""
    parser = options(__doc__, rounds=5)
    parser.add_argument("--megatokens", type=int, nargs="+", default=[20, 200], help="sizes (default: 20 200)")
    arguments = parser.parse_args()
    python = make_peer(arguments.work.resolve(), "litdata")
    sys.path.append(str(packages_of(python)))
    measures: list[Measure] = []
    for megatokens in arguments.megatokens:
        with tempfile.TemporaryDirectory(prefix="tinyllama-resuming-") as folder:
            measures += compare(Path(folder), megatokens, arguments.rounds, python)
    with tempfile.TemporaryDirectory(prefix="tinyllama-resuming-") as folder:
        measures.append(resume_a_trillion(Path(folder), arguments.rounds))
    write_measures(arguments.json, measures)


def compare(folder: Path, megatokens: int, rounds: int, python: Path) -> list[Measure]:
    """Measure resuming for one data set size."""
    write_data(folder, megatokens)
    step = recipe_of(folder).train.steps // 2 * 9 // 10
    pythons = {OURS: Path(sys.executable), "litdata": python}
    found = {name: check(folder, name, own, step) for name, own in pythons.items()}
    turns = {name: partial(first_batch, folder, name, own, step) for name, own in pythons.items()}
    firsts = take_turns(turns, rounds)
    for name, own in firsts.items():
        right = expected(folder, name, 0)[0][step * ROWS : (step + 1) * ROWS]
        if any(list(first.rows) != right for first in own):
            found[name] = f"a wrong first batch; {found[name]}"
    settings = {
        OURS: "`batches(recipe, store, step)`, which computes the order from the step",
        "litdata": "StreamingDataLoader without worker processes, which is its fastest setting; "
        "resumed with `load_state_dict` from its own `state_dict`",
    }
    programs = {name: (version_of(own, name), settings[name], found[name]) for name, own in pythons.items()}
    return [as_measure(megatokens, firsts, programs, from_start) for from_start in (True, False)]


def write_data(folder: Path, megatokens: int) -> None:
    """Write the same tokens for both programs, and a tinyllama recipe of two epochs."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, megatokens * 1_000_000, dtype=np.uint16)
    tokens.tofile(folder / "flat")
    write_random(folder / "store", tokens, {SOURCE: 1})
    write_chunks(folder / "litdata", folder / "flat")
    epoch_steps = (len(tokens) - 1) // LENGTH // ROWS  # complete batches only
    fields = recipe_of_the_card() | {"name": "resuming"}
    fields["data"] |= {
        "store": str(folder / "store"),
        "sources": {SOURCE: {"format": "jsonl", "path": "nowhere", "weight": 1}},
    }
    fields["train"] |= {"tokens": 2 * epoch_steps * ROWS * LENGTH, "batch_sequences": ROWS, "micro_batch_sequences": 1}
    fields["train"]["schedule"]["warmup_steps"] = 1
    (folder / "recipe.yaml").write_text(json.dumps(fields))


def recipe_of_the_card() -> dict[str, Any]:
    """Return the bundled 1.1B recipe's fields."""
    return Recipe.load("tinyllama-1.1b").model_dump(mode="json", exclude_unset=True)


def recipe_of(folder: Path) -> Recipe:
    return Recipe.load(folder / "recipe.yaml")


def check(folder: Path, name: str, python: Path, step: int) -> str:
    """Describe whether a resumed process reads the same rows as an uninterrupted process."""
    descriptions = []
    for workers in (0, 2) if name == "litdata" else (0,):
        for mode in ("save", "resume"):
            run(folder, name, python, step, mode, workers)
        rest, second = json.loads((folder / f"{name}-{workers}-resume.json").read_bytes())
        uninterrupted = expected(folder, name, workers)
        first = (
            "the rest of the epoch equals that of an uninterrupted run"
            if rest == uninterrupted[0][step * ROWS :]
            else "a different rest of the epoch"
        )
        share = len(set(second)) / len(set(uninterrupted[1]))
        descriptions.append(
            f"{first}, and the next epoch contains {share:.0%} of its rows"
            + f" (worker processes: {workers})" * bool(workers)
        )
    return "; ".join(descriptions)


def expected(folder: Path, name: str, workers: int) -> list[list[str]]:
    """Return the rows of both epochs that an uninterrupted process reads."""
    epochs: list[list[str]] = json.loads((folder / f"{name}-{workers}-save.json").read_bytes())
    return epochs


def run(folder: Path, name: str, python: Path, step: int, mode: str, workers: int) -> None:
    """Run benchmarks/resuming_walks.py to the end of the second epoch."""
    command: list[Any] = [python, HERE / "resuming_walks.py", name, folder, workers, step, mode]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def first_batch(folder: Path, name: str, python: Path, step: int) -> First:
    """Run a new process up to its first batch."""
    command = [python, HERE / "resuming_walks.py", name, folder, 0, step, "resume", "stop"]
    begun = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        seconds = time.perf_counter() - begun
    return First(seconds, said["own_seconds"], tuple(said["rows"]))


def as_measure(
    megatokens: int,
    firsts: Mapping[str, Sequence[First]],
    programs: Mapping[str, tuple[str, str, str]],
    from_start: bool,
) -> Measure:
    """Return the measure, with or without the start of the process."""
    return Measure(
        section="resuming",
        name=f"first batch at 90 % of {megatokens}M tokens, "
        + ("from the command" if from_start else "after the imports"),
        unit="s",
        more_is_better=False,
        how=f"The time until a new process with a warm page cache has read {ROWS} rows of {LENGTH + 1} tokens at 90 % "
        "of an epoch; it includes "
        + ("start-up and imports." if from_start else "opening the data and finding the position."),
        not_shown=NOT_SHOWN,
        programs={
            name: Program(
                version=programs[name][0],
                settings=programs[name][1],
                found=programs[name][2],
                values=[first.seconds if from_start else first.own_seconds for first in own],
            )
            for name, own in firsts.items()
        },
    )


def resume_a_trillion(folder: Path, rounds: int) -> Measure:
    """Measure the time of tinyllama's first batch at 90 % of an epoch of 1e12 zeros."""
    write_sparse(folder / "store")
    fields = recipe_of_the_card() | {"name": "resuming"}
    fields["data"] |= {"store": str(folder / "store")}
    fields["train"] |= {"batch_sequences": ROWS, "micro_batch_sequences": 1}
    (folder / "recipe.yaml").write_text(json.dumps(fields))
    step = int(0.9e12) // (ROWS * LENGTH)
    seconds = [first_batch(folder, OURS, Path(sys.executable), step).own_seconds for _ in range(rounds)]
    print(f"1e12 tokens: {number(statistics.median(seconds))} s", file=sys.stderr, flush=True)
    settings = "`batches(recipe, store, step)` over 14,900 shards, two sources"
    return Measure(
        section="resuming",
        name="first batch at 90 % of a trillion tokens, after the imports",
        unit="s",
        more_is_better=False,
        how="The first batch from a sparse store with manifests as long as those of a real store. Only tinyllama was "
        "measured.",
        not_shown="Reads from the disk, because the zeros of a sparse file are not stored there.",
        programs={OURS: Program(version=version_of(sys.executable, OURS), settings=settings, values=seconds)},
    )


if __name__ == "__main__":
    main()
