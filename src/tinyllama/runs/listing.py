"""The runs under a folder: what each is doing, how far it is, and what has come of it.

Reads the ends of metrics.jsonl and events.jsonl, the recipe, and the names of checkpoints and releases; writes nothing.
At most 1 MiB of a file is read, from its end, and the recipe as plain YAML, without torch: a hundred runs of a million
rows are listed in a second, those of another version too.
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinyllama.errors import DAMAGE_ERRORS, InputError, first_line
from tinyllama.files import is_locked, read_json
from tinyllama.formatting import format_count, format_duration, visible

State = Literal["running", "done", "stopped", "failed", "unreadable"]
Row = dict[str, Any]

_TAIL_BYTES = 1 << 16
_MOST_BYTES = 1 << 20
"""Some 4,000 rows: a validation from before that is not looked for."""
_RECENT_ROWS = 50
"""Rows whose median is a run's speed."""
_SILENCE_SECONDS, _SILENCE_STEPS = 120.0, 20
"""A run has been silent for long after both: a first step compiles, a large one takes minutes."""
_DEPTH = 4
"""Folders below which no run is looked for."""
_RUN_MARKER_FILES = ("events.jsonl", "metrics.jsonl", "lock")


@dataclass(frozen=True)
class RunState:
    """Where a run stands; what is not known is None."""

    folder: Path
    state: State
    note: str = ""
    """A few words on the state, such as the signal that stopped it, or the releases that are waiting."""
    problem: str = ""
    """What it failed on, or why it cannot be read."""
    step: int = 0
    """The last step with a row."""
    steps: int | None = None
    """Of the whole run."""
    tokens: int = 0
    """After the last step."""
    loss: float | None = None
    """Of the last step that was not skipped, nats a token."""
    validation_bits_per_byte: float | None = None
    """The last that was measured."""
    tokens_per_second: float | None = None
    """Median of the last rows."""
    seconds_left: float | None = None
    """Of the steps that are left, at that speed; of a run that is running."""
    row_age_seconds: float | None = None
    """How long ago the last row came."""
    checkpoint_step: int | None = None
    """Of the newest whole checkpoint."""
    checkpoint_age_seconds: float | None = None
    releases: int = 0
    release_step: int | None = None
    """Of the newest release."""
    release_score: float | None = None
    """Its HellaSwag acc_norm, in points."""


def find_runs(folder: Path) -> list[Path]:
    """The folders of all runs under a folder, or itself if it is one, by name. InputError where there is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder here; give the one that holds the runs, such as runs")
    return sorted(_walk(folder, _DEPTH))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        if any((folder / name).is_file() for name in _RUN_MARKER_FILES):
            yield folder
        elif depth:
            inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
            for path in inner:
                yield from _walk(path, depth - 1)
    except OSError:  # it may be a run: `read_run_status` says what is wrong with it
        yield folder


def read_run_status(run: Path, now: float | None = None) -> RunState:
    """Where a run stands at `now`, seconds since 1970; a run that cannot be read says so in its state."""
    try:
        return _state_of(run, time.time() if now is None else now)
    except (OSError, *DAMAGE_ERRORS) as error:  # an InputError is a ValueError
        return RunState(run, "unreadable", problem=first_line(error))


def _state_of(run: Path, now: float) -> RunState:
    recipe, rows = _recipe(run), _last_rows(run / "metrics.jsonl")
    last: Row = rows[-1] if rows else {"step": 0, "tokens": 0}
    steps = _steps(recipe)
    speed = statistics.median(speeds) if (speeds := _values(rows[-_RECENT_ROWS:], "tokens_per_second")) else None
    left = _seconds_left(last["step"], steps, _batch_tokens(recipe), speed)
    row_age = now - (run / "metrics.jsonl").stat().st_mtime if rows else None
    releases = _releases(run)
    state, note, problem = _classify(run, last["step"], steps, _pending_releases(run, recipe, releases))
    if state == "running":
        note = note or _stall_note(row_age, _batch_tokens(recipe), speed)
    checkpoint, checkpoint_age = _newest_checkpoint(run, now)
    newest = releases[-1] if releases else {}
    return RunState(
        folder=run,
        state=state,
        note=note,
        problem=problem,
        step=last["step"],
        steps=steps,
        tokens=last["tokens"],
        loss=next(reversed(_values(rows, "loss")), None),
        validation_bits_per_byte=_last_validation(run / "metrics.jsonl"),
        tokens_per_second=speed,
        seconds_left=left if state == "running" else None,
        row_age_seconds=row_age,
        checkpoint_step=checkpoint,
        checkpoint_age_seconds=checkpoint_age,
        releases=len(releases),
        release_step=newest.get("step"),
        release_score=newest.get("hellaswag"),
    )


def _classify(run: Path, step: int, steps: int | None, waiting: int) -> tuple[State, str, str]:
    """State, note and problem."""
    is_whole = steps is not None and step >= steps
    unreleased = f"{waiting} release{'s' * (waiting > 1)} waiting" if waiting else ""
    if is_locked(run / "lock"):
        return "running", ("releasing" if waiting else "ending") if is_whole else "" if step else "no row yet", ""
    end = _last_lifecycle_event(run)
    name, problem = end.get("event", ""), str(end.get("problem") or end.get("reason") or "")
    if is_whole and not waiting:
        return "done", "", ""
    if name in _FAILURES:
        return "failed", unreleased if is_whole else _FAILURES[name], problem
    if is_whole:
        return "done", unreleased, ""
    return "stopped", _stopped_by(end) if end else "before it began", ""


_FAILURES = {"failed": "", "hang": "hung", "rank-lost": "lost a rank"}
_LIFECYCLE_EVENTS = {*_FAILURES, "start", "resume", "done", "signal", "interrupted"}
"""Events that say whether a run lives; all others leave that as it is."""


def _last_lifecycle_event(run: Path) -> Row:
    """The last event that says how the run is; empty where there is none."""
    events = _rows(_tail(run / "events.jsonl", _TAIL_BYTES))
    return next((row for row in reversed(events) if row.get("event") in _LIFECYCLE_EVENTS), {})


def _stopped_by(end: Row) -> str:
    if end["event"] == "signal":
        return str(end.get("signal", "a signal"))
    return "interrupted" if end["event"] == "interrupted" else "killed or cut off"


def _stall_note(age: float | None, batch_tokens: int | None, speed: float | None) -> str:
    if age is None or not (batch_tokens and speed):
        return ""
    is_long = age > max(_SILENCE_SECONDS, _SILENCE_STEPS * batch_tokens / speed)
    return f"no row for {format_duration(age)}" if is_long else ""


def _recipe(run: Path) -> Row:
    """The recipe's fields, whichever version wrote them; empty where the run has none yet."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
        fields = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        place = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise InputError(f"{path}{place}: not valid YAML; copy a checkpoint's, or train on, which writes it") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: not a recipe; copy a checkpoint's, or train on, which writes it")
    return fields


def _batch_tokens(recipe: Row) -> int | None:
    train = recipe.get("train", {})
    sizes = [train.get(name) for name in ("batch_sequences", "sequence_length")]
    return sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None


def _steps(recipe: Row) -> int | None:
    tokens, batch = recipe.get("train", {}).get("tokens"), _batch_tokens(recipe)
    return -(-tokens // batch) if isinstance(tokens, int) and batch else None


def _seconds_left(step: int, steps: int | None, batch_tokens: int | None, speed: float | None) -> float | None:
    if steps is None or not (batch_tokens and speed):
        return None
    return max(0, steps - step) * batch_tokens / speed


def _tail(path: Path, size: int) -> bytes:
    """The whole lines among a file's last `size` bytes; nothing where it is not there."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - size)
        file.seek(start)
        data = file.read(size)
    whole = data[: data.rfind(b"\n") + 1]
    return whole[whole.find(b"\n") + 1 :] if start else whole


def _rows(lines: bytes) -> list[Row]:
    """Rows of JSON; a broken line, which training refuses by name, is left out."""
    found = []
    for line in lines.splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in found if isinstance(row, dict)]


def _last_rows(path: Path) -> list[Row]:
    return [row for row in _rows(_tail(path, _TAIL_BYTES)) if "step" in row and "tokens" in row]


def _values(rows: Iterable[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _last_validation(path: Path) -> float | None:
    """The newest among the rows that are looked at."""
    key = "validation_bits_per_byte"
    for size in (_TAIL_BYTES, _MOST_BYTES):
        lines = _tail(path, size)
        place = lines.rfind(f'"{key}"'.encode())
        if place >= 0:
            line = lines[lines.rfind(b"\n", 0, place) + 1 : lines.find(b"\n", place)]
            return next(iter(_values(_rows(line), key)), None)
    return None


def _newest_checkpoint(run: Path, now: float) -> tuple[int | None, float | None]:
    """Step and age of the newest one that is whole."""
    commits = [path for path in run.glob("checkpoints/step-*/commit.json") if path.parent.name[5:].isdigit()]
    if not commits:
        return None, None
    newest = max(commits, key=lambda path: int(path.parent.name[5:]))
    return int(newest.parent.name[5:]), now - newest.stat().st_mtime


def _releases(run: Path) -> list[Row]:
    path = run / "releases" / "releases.json"
    rows: list[Row] = read_json(path)["releases"] if path.is_file() else []
    return rows


def _pending_releases(run: Path, recipe: Row, releases: Sequence[Row]) -> int:
    """Milestones that were reached and have no release with scores yet."""
    wanted = recipe.get("release") or {}
    if not (wanted.get("at_tokens") or wanted.get("every_tokens")):
        return 0
    complete = {row["step"] for row in releases if row.get("complete")}
    states = [read_json(path.with_name("state.json")) for path in run.glob("checkpoints/step-*/commit.json")]
    return sum(bool(state.get("milestone")) and state["step"] not in complete for state in states)


def table(folder: Path) -> list[str]:
    """The lines that list the runs under a folder: on a terminal as wide as that, elsewhere every column.

    Raises InputError where there is no folder.
    """
    states = [read_run_status(run) for run in find_runs(folder)]
    if not states:
        return [visible(f"{folder}: no run here; `tinyllama train` makes one")]
    rows = [_cells(one, folder) for one in states]
    console = Console(highlight=False)
    lines = _format_rich(rows, states, console) if console.is_terminal else _format_plain(rows)
    problems = [visible(f"{row['run']}: {one.problem}") for row, one in zip(rows, states, strict=True) if one.problem]
    return [*lines, *([""] if problems else []), *problems]


_COLUMN_DROP_ORDER = ("releases", "bits/byte", "tokens", "last row", "checkpoint", "tokens/s", "left", "loss")
"""Columns that a terminal too narrow for all of them does without, in this order."""
_LEFT_ALIGNED_COLUMNS = ("run", "state", "releases")
_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "unreadable": "red", "stopped": "yellow"}


def _cells(one: RunState, folder: Path) -> dict[str, str]:
    """A run's row: text by column."""
    name = one.folder.relative_to(folder).as_posix() if one.folder != folder else folder.resolve().name
    step = f"{one.step:,}" + (f" of {one.steps:,}" if one.steps else "")
    checkpoint = f"{one.checkpoint_step:,}, {_format_age(one.checkpoint_age_seconds)}" if one.checkpoint_step else ""
    speed = f"{one.tokens_per_second:,.0f}" if one.tokens_per_second else ""
    return {
        "run": visible(name).replace("\n", "\\n"),
        "state": visible(f"{one.state}, {one.note}" if one.note else one.state),
        "step": step,
        "tokens": format_count(one.tokens),
        "loss": _decimals(one.loss),
        "bits/byte": _decimals(one.validation_bits_per_byte),
        "tokens/s": speed,
        "left": "" if one.seconds_left is None else format_duration(one.seconds_left),
        "last row": _format_age(one.row_age_seconds) if one.state == "running" else "",
        "checkpoint": checkpoint,
        "releases": _released(one),
    }


def _released(one: RunState) -> str:
    score = "" if one.release_score is None else f", HellaSwag {one.release_score:.1f}"
    return f"{one.releases}: step {one.release_step:,}{score}" if one.release_step is not None else ""


def _format_age(seconds: float | None) -> str:
    """In the largest unit alone."""
    return "" if seconds is None else f"{' '.join(format_duration(seconds).split()[:2])} ago"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _widths(rows: Sequence[dict[str, str]], columns: Iterable[str]) -> dict[str, int]:
    return {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}


def _format_plain(rows: Sequence[dict[str, str]]) -> list[str]:
    """Aligned columns; an empty cell is a dash, so that the columns of a line can be counted."""
    filled = [{name: cell or "-" for name, cell in row.items()} for row in rows]
    widths = _widths(filled, rows[0])
    lines = [{name: name for name in widths}, *filled]
    return ["  ".join(_aligned(name, row[name], widths[name]) for name in widths).rstrip() for row in lines]


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in _LEFT_ALIGNED_COLUMNS else cell.rjust(width)


def _format_rich(rows: Sequence[dict[str, str]], states: Sequence[RunState], console: Console) -> list[str]:
    """The columns that fit, without those that are empty in every row."""
    widths = _widths(rows, [name for name in rows[0] if any(row[name] for row in rows)])
    for name in _COLUMN_DROP_ORDER:
        if sum(widths.values()) + 2 * len(widths) <= console.width:
            break
        widths.pop(name, None)
    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in widths:
        found.add_column(name, justify="left" if name in _LEFT_ALIGNED_COLUMNS else "right", no_wrap=name != "state")
    for row, one in zip(rows, states, strict=True):
        cells = {name: Text(row[name]) for name in widths}
        cells["state"].stylize(_COLOURS[one.state])
        found.add_row(*cells.values())
    with console.capture() as captured:
        console.print(found)
    return captured.get().splitlines()
