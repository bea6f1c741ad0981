"""Weights & Biases as a sink: one run of the recipe's project, of one identity however often training starts.

Its own log lies in `RUN/wandb`. What was logged there cannot be taken back: where a run went back to a checkpoint, the
steps that are done again are not shown twice, and the curve keeps what they were at first.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path

import wandb

from tinyllama.files import write_atomically
from tinyllama.recipe import Recipe
from tinyllama.track.record import Row, Scores
from tinyllama.track.words import alert_of


class Wandb:
    """A run on W&B; its axis is the tokens."""

    def __init__(self, run: Path, recipe: Recipe, is_new: bool) -> None:
        self.run = wandb.init(
            project=recipe.track.wandb,
            name=recipe.name,
            id=_identity(run / "trackers" / "wandb.id", is_new),
            resume="allow",
            dir=run,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def rows(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Show metrics. W&B counts in its own steps, for scores come later than the steps that they are of."""
        for row in rows:
            self.run.log(row)

    def events(self, events: Sequence[Row], losses: tuple[float, float] | None) -> None:
        """Send an alert of what went wrong; W&B may mail it."""
        for alert in map(alert_of, events):
            if alert.level == "error":
                self.run.alert(title=alert.title, text=alert.text, level="ERROR")

    def scores(self, row: Row, time: float) -> None:
        """Show a release's scores at its tokens."""
        self.run.log(row)

    def baselines(self, baselines: dict[str, Scores]) -> None:
        """Put them beside the recipe."""
        self.run.config.update({"baselines": baselines}, allow_val_change=True)

    def go_back(self, step: int) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        """Wait until W&B has all."""
        self.run.finish()


def _identity(path: Path, is_new: bool) -> str:
    """The run's identity at W&B, made up when it is first shown."""
    if is_new or not path.is_file():
        with write_atomically(path) as file:
            file.write(uuid.uuid4().hex.encode())
    return path.read_text()
