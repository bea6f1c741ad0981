"""Comparison of models after equal minutes of training, by bits per byte of the same held-out documents.

    python benchmarks/quality.py [--minutes 6] [--rounds 3] [--only tinyllama "litgpt, our learning rate"]

tinyllama trains the demo's recipe. litgpt, the Hugging Face Trainer and nanochat train on rows of the same text with
the same tokenizer, once with their defaults and once with the learning rate and batch size of the demo's earlier
recipe. Their models have as many parameters, within 3 %. Each round has its own seed. Peers are installed under --work.

The minutes are those that a user waits: from the start of the process to its end, with imports, compilation into an
empty cache, and saving. The number of steps is computed from a short run before the first round, and from the last run
before the other rounds, so that each run completes its learning-rate schedule.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ablation import EARLIER, make_data
from measuring import OURS, Measure, number, options, spread, take_turns, write_measures
from measuring import Program as Recorded
from peers import PEERS, make_peer, version_of
from quality_peers import PADDING
from quality_settings import SETTINGS
from training_setup import Work, environment, run_logged, write_rows

from tinyllama.data.store import TokenStore
from tinyllama.hardware import available_cpu_count
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.validation import target_bytes

HERE = Path(__file__).parent
RUN, PREFIX = "quality", "tinyllama-quality-"
"""Name of our run, and prefix of the temporary folders."""
MIN_TRIAL_STEPS = 4
"""Fewest steps from which the speed of a peer is measured."""
TOLERANCE = 0.03
"""Largest relative difference between the numbers of parameters."""
TRIAL_TOKENS_PER_MINUTE = 50_000
"""Tokens of the short run that measures a program's speed, per minute of the runs that follow."""


class Pace(NamedTuple):
    """The speed of a run, in seconds."""

    fixed: float
    """Time outside the steps: imports, compilation, the last checkpoint."""
    step: float
    pause: float = 0.0
    """Validation, samples and checkpoint after every `pause_steps` steps and after the last step."""
    pause_steps: int = 1


class Trained(NamedTuple):
    """The result of a run."""

    bits_per_byte: float
    num_parameters: int
    tokens: int
    minutes: float


class Comparison:
    """The data of the comparison, and the speed of each program."""

    def __init__(self, source: str | Path, fields: Mapping[str, Any], arguments: argparse.Namespace) -> None:
        """Load a recipe with changed fields, and write the windows of the store's held-out documents."""
        self.source, self.fields, self.arguments = source, dict(fields), arguments
        self.recipe = Recipe.load(source, fields)
        self.earlier = Recipe.load(source, {**fields, **EARLIER}).train
        """Settings for AdamW."""
        self.tokenizer = Tokenizer.load(self.recipe.tokenizer)
        self.paces: dict[str, Pace] = {}
        documents = list(read_documents(TokenStore.open(self.recipe.data.store)))
        self.num_bytes = sum(len(target_bytes(document[None], self.tokenizer)) for document in documents)
        self.windows = arguments.work / "quality" / "windows.npy"
        self.windows.parent.mkdir(parents=True, exist_ok=True)
        length = self.recipe.train.sequence_length
        np.save(self.windows, torch.cat([windows_of(document, length) for document in documents]).numpy())

    def turn(self, name: str, seeds: Iterator[int]) -> Trained:
        """Train a program's model for the given minutes, and score it."""
        seed = next(seeds)
        if name not in self.paces:
            with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
                self.train(name, self.trial_steps(name), seed, Path(folder))
        steps = steps_within(self.paces[name], 60 * self.arguments.minutes)
        with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
            minutes = self.train(name, steps, seed, Path(folder)) / 60
            found = self.score(name, Path(folder))
        bits_per_byte = found["nats"] / math.log(2) / self.num_bytes
        tokens = steps * self.batch_sequences(name) * self.recipe.train.sequence_length
        return Trained(bits_per_byte, found["num_parameters"], tokens, minutes)

    def trial_steps(self, name: str) -> int:
        """Return the number of steps of the short run."""
        train = self.recipe.train
        tokens = TRIAL_TOKENS_PER_MINUTE * self.arguments.minutes
        steps = round(tokens / (self.batch_sequences(name) * train.sequence_length))
        return max(steps, train.schedule.warmup_steps + 2 if name == OURS else MIN_TRIAL_STEPS)

    def batch_sequences(self, name: str) -> int:
        """Return the number of sequences per step of a program."""
        train = self.recipe.train
        if name == OURS:
            return train.batch_sequences
        return int(SETTINGS[name].fields(self.earlier, 1)["batch_sequences"])

    def train(self, name: str, steps: int, seed: int, folder: Path) -> float:
        """Train a program's model for `steps` steps in an empty folder, record its pace, and return the seconds."""
        prepare = self.prepare_ours if name == OURS else partial(self.prepare_peer, name)
        command, job = prepare(folder, steps, seed)
        (folder / "job.json").write_text(json.dumps({**job, "windows": str(self.windows)}))
        begun = time.time()
        run_logged([self.python(name), *command], folder / "log", folder, self.environment(folder))
        ended = time.time()
        self.paces[name] = (pace_of_run if name == OURS else pace_of_peer)(folder, begun, ended)
        return ended - begun

    def score(self, name: str, folder: Path) -> dict[str, Any]:
        """Return the summed nats of the held-out documents and the number of parameters of a saved model."""
        command = [self.python(name), HERE / "quality_peers.py", "score", peer_of(name), folder / "job.json"]
        run_logged(command, folder / "log-score", folder, self.environment(folder))
        found: dict[str, Any] = json.loads((folder / "score.json").read_bytes())
        return found

    def python(self, name: str) -> Path:
        """Return the Python of a program."""
        return Path(sys.executable) if name == OURS else make_peer(self.arguments.work, peer_of(name))

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment of all programs, with an empty compile cache in the folder of the run."""
        work = Work(self.arguments.work, Path(self.recipe.tokenizer), Path(self.recipe.data.store), Path())
        return environment(work, self.arguments.threads) | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}

    def prepare_ours(self, folder: Path, steps: int, seed: int) -> tuple[list[str | Path], dict[str, Any]]:
        """Return the arguments of Python for `tinyllama train`, and the job of the scoring."""
        train = self.recipe.train
        fields = {**self.fields, "name": RUN, "seed": seed, "train.tokens": steps * train.batch_tokens}
        flags = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        return ["-m", "tinyllama", "train", self.source, *flags], {"model": str(folder / "runs" / RUN)}

    def prepare_peer(self, name: str, folder: Path, steps: int, seed: int) -> tuple[list[str | Path], dict[str, Any]]:
        """Return the arguments of Python for a peer, and its job; write the rows that it reads."""
        train = self.recipe.train
        settings = SETTINGS[name].fields(self.earlier, steps)
        batch = settings["batch_sequences"]
        rows = {
            **self.fields,
            "seed": seed,
            "train.tokens": steps * batch * train.sequence_length,
            "train.batch_sequences": batch,
            "train.micro_batch_sequences": batch,
            "train.schedule.warmup_steps": 0,  # the peer has a schedule of its own
        }
        job = {
            **self.recipe.model.model_dump(),
            **settings,
            "vocab_size": self.tokenizer.vocab_size,
            "sequence_length": train.sequence_length,
            "rows": str(write_rows(folder / "rows.npy", Recipe.load(self.source, rows))),
            "steps": steps,
            "seed": seed,
        }
        return [HERE / "quality_peers.py", "train", peer_of(name), folder / "job.json"], job


def main() -> None:
    """Print the tables, and write the measure to the file of --json."""
    arguments = parse_arguments()
    names = [OURS, *(name for name in SETTINGS if not arguments.only or {name, peer_of(name)} & {*arguments.only})]
    for peer in {peer_of(name) for name in names} & PEERS.keys():
        make_peer(arguments.work, peer)
    comparison = Comparison("demo", make_demo(arguments.work / "quality"), arguments)
    seeds = range(comparison.recipe.seed, sys.maxsize)
    turns = {name: partial(comparison.turn, name, iter(seeds)) for name in names}
    found = take_turns(turns, arguments.rounds)
    print("\n".join(table(found)), flush=True)
    check_sizes(found)
    write_measures(arguments.json, [as_measure(found, comparison)])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=6.0, help="minutes of each run (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=available_cpu_count(), help="threads of each program (default: %(default)s)"
    )
    names = "; ".join(SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"peers to compare with {OURS}: {names}")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if unknown := {*(arguments.only or [])} - SETTINGS.keys() - PEERS.keys() - {OURS}:
        raise SystemExit(f"--only {unknown.pop()!r}: no such program; known are {OURS}; {names}")
    return arguments


def make_demo(folder: Path) -> dict[str, Any]:
    """Make the demo's text, tokenizer and store, unless they exist; return the recipe's fields with their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder)
    demo, sources = folder / "runs/demo", ("slimpajama", "starcoderdata")
    paths = {f"data.sources.{name}.path": str(demo / "corpus" / name) for name in sources}
    return {"tokenizer": str(demo / "tokenizer"), "data.store": str(demo / "store"), **paths}


def peer_of(name: str) -> str:
    """Return the first word of the name of a program and its settings."""
    return name.partition(",")[0]


def read_documents(store: TokenStore) -> Iterator[torch.Tensor]:
    """Yield the token ids of each held-out document, int64 [T]."""
    for split in (split for name, split in store.splits.items() if name.endswith("/validation")):
        for found in split.find_documents(range(len(split))):
            yield torch.from_numpy(split.read(found.start, found.start + found.tokens).astype("int64"))


def windows_of(document: torch.Tensor, length: int) -> torch.Tensor:
    """Return a document's windows from its start, int64 [N, length + 1]; each token but the first is one target."""
    rows = [document[start : start + length + 1] for start in range(0, len(document) - 1, length)]
    padded = torch.full((len(rows), length + 1), PADDING)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def steps_within(pace: Pace, seconds: float) -> int:
    """Return the largest number of steps that end within `seconds`. Raises SystemExit if there is none."""
    steps = int((seconds - pace.fixed - pace.pause) / (pace.step + pace.pause / pace.pause_steps))
    if steps < 1:
        needed = (pace.fixed + pace.pause + pace.step) / 60
        raise SystemExit(f"--minutes {seconds / 60:g}: too short for one step; give at least {needed:.1f}")
    return steps


def pace_of_run(folder: Path, begun: float, ended: float) -> Pace:
    """Return the speed of our run from its log; the process ran from `begun` to `ended`, in seconds since 1970."""
    run = RunDir(folder / "runs" / RUN)
    train = Recipe.load(run.recipe_path).train
    times = {event["event"]: event["time"] for event in run.events()}
    steps = [train.batch_tokens / row["tokens_per_second"] for row in run.metrics()]
    step, pauses = statistics.mean(steps[1:]), -(-len(steps) // train.validate_every_steps)
    pause = (times["done"] - times["start"] - sum(steps)) / pauses
    return Pace(ended - begun - len(steps) * step - pauses * pause, step, pause, train.validate_every_steps)


def pace_of_peer(folder: Path, begun: float, ended: float) -> Pace:
    """Return the speed of a peer's run from the times of its steps."""
    times = list(map(float, (folder / "steps.txt").read_text().split()))
    step = statistics.mean(later - earlier for earlier, later in pairwise(times[1:]))  # the second step compiles too
    return Pace(ended - begun - len(times) * step, step)


def table(found: Mapping[str, Sequence[Trained]]) -> list[str]:
    """Return the table of the results, with the range of several rounds."""
    lines = [
        f"| program | parameters | tokens | minutes | bits per byte | {OURS} is lower by |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        pairs = zip(found[OURS], runs, strict=True)
        lower = [100 * (1 - ours.bits_per_byte / theirs.bits_per_byte) for ours, theirs in pairs]
        cells = (
            name,
            f"{runs[0].num_parameters:,}",
            spread((run.tokens for run in runs), ",.0f"),
            spread((run.minutes for run in runs), ".1f"),
            spread((run.bits_per_byte for run in runs), ".4f"),
            "" if name == OURS else f"{spread(lower, '.1f')} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def check_sizes(found: Mapping[str, Sequence[Trained]]) -> None:
    """Raise RuntimeError if the models have different numbers of parameters."""
    ours = found[OURS][0].num_parameters
    for name, runs in found.items():
        if abs(runs[0].num_parameters / ours - 1) > TOLERANCE:
            raise RuntimeError(f"{name}: {runs[0].num_parameters:,} parameters, {ours:,} of {OURS}")


def as_measure(found: Mapping[str, Sequence[Trained]], comparison: Comparison) -> Measure:
    """Return the measure of bits per byte."""
    minutes, threads = comparison.arguments.minutes, comparison.arguments.threads
    programs = {}
    for name, runs in found.items():
        peer, settings = peer_of(name), "the recipe as it is"
        tokens = number(statistics.median(run.tokens for run in runs))
        took = spread((run.minutes for run in runs), ".1f")
        programs[name] = Recorded(
            version=version_of(comparison.python(name), peer),
            settings=settings if name == OURS else SETTINGS[name].text,
            values=[run.bits_per_byte for run in runs],
            found=f"{runs[0].num_parameters:,} parameters, {tokens} tokens in {took} minutes",
        )
    return Measure(
        section="quality",
        name=f"bits per byte after {minutes:g} minutes",
        unit="bits/byte",
        more_is_better=False,
        how=f"All programs train on the text of the demo's recipe with its tokenizer, {threads} threads and the same "
        f"settings of torch and glibc, for {minutes:g} minutes from the start of the process to its end, with imports, "
        "compilation into an empty cache, and saving. The number of steps is computed before from the speed of a short "
        "run, so that each run completes its learning-rate schedule. The value is the bits per byte of "
        f"{comparison.num_bytes / 1e6:.2f} MB of held-out documents in float32, each document in windows of "
        f"{comparison.recipe.train.sequence_length} tokens from its start. Each round has its own seed.",
        not_shown="longer runs, larger models, GPUs; settings of the other programs that were searched for this text.",
        programs=programs,
    )


if __name__ == "__main__":
    main()
