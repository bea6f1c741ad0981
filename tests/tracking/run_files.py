"""Files of a run, written without training, and a sink that records its calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import small_recipe

from tinyllama.files import Row, write_json
from tinyllama.recipe import Recipe
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tracking.follow import RunFollower, Scores, SinkPosition

BATCH_TOKENS = 6 * 64


class RecordingSink:
    """A sink that records what it receives.

    On a rewind it forgets the steps after the given one (`"to step"`), everything (`"to start"`) or nothing
    (`"never"`).
    """

    def __init__(self, rewinds: str = "to step") -> None:
        self.rewinds = rewinds
        self.metrics: list[Row] = []
        self.times: list[float] = []
        self.events: list[str] = []
        self.scores: list[Row] = []
        self.baselines: dict[str, Scores] = {}
        self.rewound_to: list[int] = []

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.metrics]

    def log_metrics(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        self.metrics += rows
        self.times += times

    def log_events(self, events: Sequence[Row]) -> None:
        self.events += [event["event"] for event in events]

    def log_scores(self, row: Row, time: float) -> None:
        self.scores.append(row)

    def set_baselines(self, baselines: dict[str, Scores]) -> None:
        self.baselines = baselines

    def rewind(self, step: int) -> int | None:
        self.rewound_to.append(step)
        if self.rewinds == "never":
            return None
        kept = step if self.rewinds == "to step" else 0
        self.metrics = [row for row in self.metrics if row["step"] <= kept]
        if kept == 0:
            self.events, self.scores = [], []
        return kept

    def durable_position(self, position: SinkPosition) -> SinkPosition:
        return position

    def close(self) -> None:
        pass


def new_run(folder: Path, name: str = "small", release: Row | None = None) -> tuple[RunDir, RunLog]:
    """Create a run that has started; its log's clock advances by a second per event."""
    run = RunDir(folder / "runs" / name)
    run.path.mkdir(parents=True)
    recipe = Recipe.model_validate(small_recipe(folder) | {"name": name, "release": release or {}})
    run.recipe_path.write_text(recipe.to_yaml())
    log = RunLog(run, clock=iter(range(1_700_000_000, 1_800_000_000)).__next__)
    log.event("start", 0, ranks=1)
    return run, log


def write_steps(log: RunLog, first: int, last: int, change: float = 0.0, **more: Any) -> None:
    """Write the rows of some steps, whose loss is 1 + 8 / step + `change`."""
    for number in range(first, last + 1):
        row = {"step": number, "tokens": number * BATCH_TOKENS, "loss": 1 + 8 / number + change, "learning_rate": 1e-3}
        log.metrics(row | {"gradient_norm": 1.0, "tokens_per_second": 384.0, "mfu": 0.4, "memory_bytes": 10**9} | more)


def write_resume(log: RunLog, step: int, **details: Any) -> None:
    """Resume from a step, as training does."""
    log.truncate_after(step)
    log.event("resume", step, ranks=1, **details)


def follow(run: RunDir, sink: Any) -> RunFollower:
    return RunFollower(run, "recorded", sink)


def write_release(run: RunDir, step: int, points: float, baselines: Sequence[Row] = ()) -> None:
    """Write a release with a HellaSwag score of `points`, and the table of releases."""
    release = run.releases.release(run.checkpoint(step).name)
    write_json(release.evaluation_path, evaluation("x", step, points))
    write_json(release.metadata_path, {"step": step, "tokens": step * BATCH_TOKENS, "files": {}})
    rows = [{"step": metadata["step"]} for _, metadata in run.releases.releases()]
    write_json(run.releases.table_path, {"releases": rows, "baselines": list(baselines)})


def evaluation(model: str, step: int | None, points: float) -> Row:
    tasks = {"hellaswag": {"acc": 0.3, "acc_norm": points / 100}, "boolq": {"acc": 0.5}}
    return {"model": model, "step": step, "tokens": None, "rows": tasks}
