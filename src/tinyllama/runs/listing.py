"""The runs in a folder, with their state, progress, newest checkpoint and newest release.

This module reads at most the last 1 MiB of each file, so listing a hundred runs with a million rows each takes about
one second. Recipes are read without validation, so that the list includes runs of other tinyllama versions. The module
does not import torch and writes no files.
"""

import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from tinyllama.errors import DAMAGE_ERRORS, InputError, first_line
from tinyllama.files import Row, last_rows
from tinyllama.formatting import format_count, format_duration, format_score, format_table, visible
from tinyllama.runs.log import EVENT_KINDS
from tinyllama.runs.run_dir import RunDir

State = Literal["running", "done", "stopped", "failed", "unreadable"]

_TAIL_BYTES = 1 << 16
_MAX_TAIL_BYTES = 1 << 20
"""Maximum number of bytes at the end of metrics.jsonl that are searched for the newest validation: about 4,000 rows."""
_RECENT_ROWS = 50
"""Number of newest rows from which the median speed is computed."""
_STALL_SECONDS, _STALL_STEPS = 120.0, 20
"""Time without a new row after which a run counts as stalled: seconds, and number of median step times. The longer time
applies."""
_MAX_DEPTH = 4
"""Maximum depth of folders in the search for runs."""
_BITS_PER_BYTE = "validation_bits_per_byte"
_MAX_RECIPE_BYTES = 1 << 20
_FAILURE_NOTES = {"failed": "", "hang": "hung", "rank-lost": "lost a rank"}


@dataclass(frozen=True)
class RunStatus:
    """State and progress of a run; unknown values are None."""

    run: RunDir
    state: State
    note: str = ""
    """Short note on the state, such as the signal that stopped the run, or the number of pending releases."""
    problem: str = ""
    """Reason why the run failed or cannot be read."""
    step: int = 0
    """Newest step with a row."""
    steps: int | None = None
    """Number of steps of the complete run."""
    tokens: int = 0
    """Training tokens up to the newest step."""
    loss: float | None = None
    """Newest training loss, in nats per token."""
    validation_bits_per_byte: float | None = None
    """Newest validation result, in bits per byte."""
    validation_bits_per_byte_by_source: dict[str, float] = field(default_factory=dict)
    """The same result of each source."""
    tokens_per_second: float | None = None
    """Median throughput of the newest rows, in tokens per second."""
    seconds_left: float | None = None
    """Estimated time of the remaining steps in seconds, only for a running run."""
    row_age_seconds: float | None = None
    """Time since the newest row, in seconds."""
    checkpoint_step: int | None = None
    """Step of the newest committed checkpoint."""
    checkpoint_age_seconds: float | None = None
    """Time since the newest checkpoint, in seconds."""
    releases: int = 0
    """Number of releases."""
    release_step: int | None = None
    """Step of the newest release."""
    release_score: float | None = None
    """HellaSwag acc_norm of the newest release, in percent."""


def find_runs(folder: Path) -> list[RunDir]:
    """Return all runs below a folder, or the folder itself if it is a run, sorted by path.

    Raises InputError if the folder does not exist.
    """
    if not folder.is_dir():
        remedy = "give the folder that contains the runs, or make the first run: tinyllama init FILE"
        raise InputError(f"{folder}: no folder here; {remedy}")
    return [RunDir(path) for path in sorted(_walk(folder, _MAX_DEPTH))]


def runs_in(folder: Path) -> list[RunDir]:
    """Return the runs directly in a folder, sorted by name."""
    return [RunDir(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        if RunDir(folder).is_started:
            yield folder
        elif depth:
            for path in [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]:
                yield from _walk(path, depth - 1)
    except OSError:  # possibly a run; `read_run_status` then reports the problem
        yield folder


def read_run_status(run: RunDir, now: float | None = None) -> RunStatus:
    """Return a run's status at the time `now`, in seconds since 1970.

    A run that cannot be read has the state `unreadable`.
    """
    try:
        return _read_status(run, time.time() if now is None else now)
    except (OSError, *DAMAGE_ERRORS) as error:  # an InputError is a ValueError
        return RunStatus(run, "unreadable", problem=first_line(error))


def recipe_fields(run: RunDir) -> Row:
    """Return the fields of a run's recipe without validation, for recipes of any version of tinyllama.

    The result is empty without a recipe. Raises InputError if the file is not YAML or not a mapping.
    """
    path = run.recipe_path
    if not path.is_file():
        return {}
    remedy = "copy recipe.yaml from a checkpoint, or run `tinyllama train` again, which rewrites the file"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_RECIPE_BYTES)
        fields = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        line = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise InputError(f"{path}{line}: not valid YAML; {remedy}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: not a recipe; {remedy}")
    return fields


def _read_status(run: RunDir, now: float) -> RunStatus:
    train, rows = recipe_fields(run).get("train", {}), _last_metrics(run, _TAIL_BYTES)
    last: Row = rows[-1] if rows else {"step": 0, "tokens": 0}
    speeds = _values(rows[-_RECENT_ROWS:], "tokens_per_second")
    speed = statistics.median(speeds) if speeds else None
    batch_tokens, steps = _batch_tokens_and_steps(train)
    step_seconds = batch_tokens / speed if batch_tokens and speed else None
    row_age = now - run.metrics_path.stat().st_mtime if rows else None
    releases = run.releases.table()["releases"]
    newest_release = releases[-1] if releases else {}
    checkpoint = run.newest_checkpoint()
    state, note, problem = _classify(run, last["step"], steps)
    if state == "running" and not note and step_seconds and row_age:
        is_stalled = row_age > max(_STALL_SECONDS, _STALL_STEPS * step_seconds)
        note = f"no row for {format_duration(row_age)}" if is_stalled else ""
    seconds_left = max(0, steps - last["step"]) * step_seconds if steps is not None and step_seconds else None
    validation = _last_validation(rows) or (_last_validation(_last_metrics(run, _MAX_TAIL_BYTES)) if rows else {})
    return RunStatus(
        run=run,
        state=state,
        note=note,
        problem=problem,
        step=last["step"],
        steps=steps,
        tokens=last["tokens"],
        loss=next(reversed(_values(rows, "loss")), None),
        validation_bits_per_byte=validation.get(_BITS_PER_BYTE),
        validation_bits_per_byte_by_source={
            name.removeprefix(f"{_BITS_PER_BYTE}/"): value
            for name, value in validation.items()
            if name.startswith(f"{_BITS_PER_BYTE}/")
        },
        tokens_per_second=speed,
        seconds_left=seconds_left if state == "running" else None,
        row_age_seconds=row_age,
        checkpoint_step=checkpoint.step if checkpoint else None,
        checkpoint_age_seconds=now - checkpoint.commit_path.stat().st_mtime if checkpoint else None,
        releases=len(releases),
        release_step=newest_release.get("step"),
        release_score=newest_release.get("hellaswag"),
    )


def _last_metrics(run: RunDir, num_bytes: int) -> list[Row]:
    return [row for row in last_rows(run.metrics_path, num_bytes) if "step" in row and "tokens" in row]


def _batch_tokens_and_steps(train: Row) -> tuple[int | None, int | None]:
    """Return the tokens per step and the number of steps of a recipe, of any version, from its `train` section."""
    tokens, sequences, length = (train.get(name) for name in ("tokens", "batch_sequences", "sequence_length"))
    if not (isinstance(sequences, int) and isinstance(length, int)):
        return None, None
    batch_tokens = sequences * length
    return batch_tokens, -(-tokens // batch_tokens) if isinstance(tokens, int) and batch_tokens else None


def _last_validation(rows: Sequence[Row]) -> Row:
    """Return the newest row with a validation result, or an empty row."""
    return next((row for row in reversed(rows) if row.get(_BITS_PER_BYTE) is not None), {})


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _classify(run: RunDir, step: int, steps: int | None) -> tuple[State, str, str]:
    """Return the state, note and problem of a run."""
    is_trained, num_pending = steps is not None and step >= steps, len(run.pending_milestones())
    pending = f"{num_pending} release{'s' * (num_pending > 1)} pending" if num_pending else ""
    if run.is_training:
        note = ("releasing" if pending else "ending") if is_trained else "" if step else "no row yet"
        return "running", note, ""
    if is_trained and not pending:
        return "done", "", ""
    events = [event for event in last_rows(run.events_path, _TAIL_BYTES) if event.get("event") in EVENT_KINDS]
    last = next((event for event in reversed(events) if EVENT_KINDS[event["event"]].is_lifecycle), {})
    name = last.get("event", "")
    if name in _FAILURE_NOTES:
        problem = str(last.get("problem") or last.get("reason") or "")
        return "failed", pending if is_trained else _FAILURE_NOTES[name], problem
    if is_trained:
        return "done", pending, ""
    notes = {"": "before its first step", "signal": last.get("signal", "a signal"), "interrupted": name}
    return "stopped", str(notes.get(name, "killed")), ""


_COLUMN_DROP_ORDER = ("releases", "bits/byte", "tokens", "last row", "checkpoint", "tokens/s", "left", "loss")
"""Columns omitted on a narrow terminal, in the order of their omission."""
_LEFT_ALIGNED_COLUMNS = ("run", "state", "releases")
_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "unreadable": "red", "stopped": "yellow"}


def runs_as_json(folder: Path) -> dict[str, Any]:
    """Return the runs in a folder for `tinyllama runs --json`: the fields of RunStatus, with the path of the run.

    Raises InputError if the folder does not exist.
    """
    statuses = [read_run_status(run) for run in find_runs(folder)]
    return {"folder": str(folder), "runs": [vars(status) | {"run": str(status.run.path)} for status in statuses]}


def list_runs(folder: Path) -> list[str]:
    """Format the table of runs as lines; on a terminal, omit columns that do not fit its width.

    Raises InputError if the folder does not exist.
    """
    statuses = [read_run_status(run) for run in find_runs(folder)]
    if not statuses:
        return [visible(f"{folder}: no run here; start one with `tinyllama train RECIPE`")]
    rows, console = [_cells(status, folder) for status in statuses], Console()
    columns = _fitting_columns(rows, console.width) if console.is_terminal else list(rows[0])
    table: list[list[str | Text]] = []
    for status, row in zip(statuses, rows, strict=True):
        table.append([row[name] or ("" if console.is_terminal else "-") for name in columns])
        if console.is_terminal:
            table[-1][columns.index("state")] = Text(row["state"], _COLOURS[status.state])
    right = [name for name in columns if name not in _LEFT_ALIGNED_COLUMNS]
    problems = [
        visible(f"{row['run']}: {status.problem}") for row, status in zip(rows, statuses, strict=True) if status.problem
    ]
    hidden = [name for name in rows[0] if name not in columns and any(row[name] for row in rows)]
    note = f"not shown at {console.width} columns: {', '.join(hidden)}; widen the terminal, or use --json"
    notes = [*(textwrap.wrap(note, console.width) if hidden else []), *problems]
    return [*format_table(columns, table, right=right), *([""] if notes else []), *notes]


def _fitting_columns(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """Return the non-empty columns that together fit into `width` characters."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0] if any(r[name] for r in rows)}
    for name in _COLUMN_DROP_ORDER:
        if sum(widths.values()) + 2 * len(widths) <= width:
            break
        widths.pop(name, None)
    return list(widths)


def _cells(status: RunStatus, folder: Path) -> dict[str, str]:
    """Return a run's row of the table: one string per column, empty if the value is unknown."""
    path = status.run.path
    name = path.relative_to(folder).as_posix() if path != folder else status.run.name
    score = "" if status.release_score is None else f", HellaSwag {format_score(status.release_score)}"
    checkpoint_age = _format_age(status.checkpoint_age_seconds)
    return {
        "run": visible(name).replace("\n", "\\n"),
        "state": visible(f"{status.state}, {status.note}" if status.note else status.state),
        "step": f"{status.step:,}" + (f" of {status.steps:,}" if status.steps else ""),
        "tokens": format_count(status.tokens),
        "loss": "" if status.loss is None else f"{status.loss:.3f}",
        "bits/byte": "" if status.validation_bits_per_byte is None else f"{status.validation_bits_per_byte:.3f}",
        "tokens/s": f"{status.tokens_per_second:,.0f}" if status.tokens_per_second else "",
        "left": "" if status.seconds_left is None else format_duration(status.seconds_left),
        "last row": _format_age(status.row_age_seconds) if status.state == "running" else "",
        "checkpoint": f"{status.checkpoint_step:,}, {checkpoint_age}" if status.checkpoint_step else "",
        "releases": "" if status.release_step is None else f"{status.releases}: step {status.release_step:,}{score}",
    }


def _format_age(seconds: float | None) -> str:
    """Format an age in its largest unit, such as `5 min ago`."""
    return "" if seconds is None else f"{' '.join(format_duration(max(1, seconds)).split()[:2])} ago"
