"""A run's files without a run, written as training writes them, and a sink that keeps what it is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import small_recipe

from tinyllama.files import write_json
from tinyllama.recipe import Recipe
from tinyllama.runs.jsonl import Row
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import RunFollower, Scores, SinkPosition

BATCH_TOKENS = 6 * 64


class Recorded:
    """A sink. `goes_back`: how it answers where other numbers come, as a step, or None where it cannot forget."""

    def __init__(self, goes_back: str = "to the step") -> None:
        self.goes_back = goes_back
        self.shown: list[Row] = []
        self.times: list[float] = []
        self.happened: list[str] = []
        self.loss_range: tuple[float, float] | None = None
        self.scored: list[Row] = []
        self.beside: dict[str, Scores] = {}
        self.went_back: list[int] = []

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        self.shown += rows
        self.times += times

    def log_events(self, events: Sequence[Row], loss_range: tuple[float, float] | None) -> None:
        self.happened += [event["event"] for event in events]
        self.losses = loss_range

    def log_scores(self, row: Row, time: float) -> None:
        self.scored.append(row)

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        self.beside = baselines

    def rewind(self, step: int) -> int | None:
        self.went_back.append(step)
        if self.goes_back == "not at all":
            return None
        kept = step if self.goes_back == "to the step" else 0
        self.shown = [row for row in self.shown if row["step"] <= kept]
        if kept == 0:
            self.happened, self.scored = [], []
        return kept

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        return position

    def close(self) -> None:
        pass


def new_run(folder: Path, name: str = "small", release: Row | None = None, **fields: Any) -> tuple[Path, RunLog]:
    """A run that has begun, and what writes its files."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    recipe = Recipe.model_validate(small_recipe(folder) | {"name": name, "release": release or {}})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=fields)})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    journal = RunLog(RunDir(run), clock=iter(range(1_700_000_000, 1_800_000_000)).__next__)
    journal.event("start", 0, ranks=1)
    return run, journal


def step(journal: RunLog, first: int, last: int, change: float = 0.0, **more: Any) -> None:
    """Write the rows of some steps, whose loss falls from 9."""
    for number in range(first, last + 1):
        row = {"step": number, "tokens": number * BATCH_TOKENS, "loss": 1 + 8 / number + change, "learning_rate": 1e-3}
        journal.metrics(
            row | {"gradient_norm": 1.0, "tokens_per_second": 384.0, "mfu": 0.4, "memory_bytes": 10**9} | more
        )


def resume(journal: RunLog, step: int, **details: Any) -> None:
    """What the files say when a run goes on."""
    journal.truncate_after(step)
    journal.event("resume", step, ranks=1, **details)


def follower(run: Path, sink: Any, name: str = "recorded") -> RunFollower:
    return RunFollower(RunDir(run), name, sink)


def release(run: Path, step: int, points: float, baselines: Sequence[Row] = ()) -> None:
    """A release with a score, in the table of all."""
    folder = run / "releases" / f"step-{step:08}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", evaluation("x", step, points))
    write_json(folder / "release.json", {"step": step, "tokens": step * BATCH_TOKENS, "files": {}})
    known = [path.parent for path in sorted(run.glob("releases/step-*/evaluation.json"))]
    rows = [
        {"step": int(path.name[5:]), "tokens": int(path.name[5:]) * BATCH_TOKENS, "folder": path.name} for path in known
    ]
    write_json(run / "releases" / "releases.json", {"releases": rows, "baselines": list(baselines)})


def evaluation(model: str, step: int | None, points: float) -> dict[str, Any]:
    tasks = {"hellaswag": {"acc": 0.3, "acc_norm": points / 100}, "boolq": {"acc": 0.5}}
    return {"model": model, "step": step, "tokens": None, "rows": tasks}
