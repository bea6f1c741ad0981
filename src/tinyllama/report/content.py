"""The content of a report: tables of all data in a run's folder except the weights. The folder is read once.

Only the recipe is required. If other data is missing, the corresponding fields of `RunData` are empty or None. Tables
are pure functions of `RunData`. Cells are text, not HTML. The tables of data and scores have the same cells as those in
the model card.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.evaluate.results import SCORE_COLUMNS, score_rows
from tinyllama.files import numbered_rows, read_json_if_exists, rows_since, sha256_of
from tinyllama.formatting import MISSING, format_bytes, format_count, format_duration_precise, format_percent
from tinyllama.model.flops import num_parameters
from tinyllama.plots.curves import MetricsAccumulator, MetricsSummary, metric_names
from tinyllama.recipe import Recipe, differences
from tinyllama.release.card import DATA_COLUMNS, RELEASE_COLUMNS, data_rows, release_rows
from tinyllama.release.metadata import release_score, releases_table, summarize_store
from tinyllama.runs.listing import RunStatus, read_run_status
from tinyllama.runs.log import INFO, PROBLEM, Event, describe_event, event_category
from tinyllama.runs.run_dir import RunDir

Json = Mapping[str, Any]

MAX_EVENTS = 1000
"""Maximum number of events in one list; events.jsonl contains all events."""
MAX_NOTABLE_EVENTS = 25
"""Maximum number of events that are always visible. With more events, the list of all events is collapsed."""


MAX_EVALUATIONS = 50
"""Maximum number of evaluations during training in one table; evaluations.jsonl contains all of them."""
DURING_TRAINING = "during training"


@dataclass(frozen=True)
class RunData:
    """Content of a run's folder at the time `read_at`."""

    folder: Path
    recipe: Recipe
    read_at: float
    """Time at which the folder was read, in seconds since 1970."""
    state: RunStatus
    metrics: MetricsSummary
    events: list[Json]
    """Events, oldest first."""
    store: Json | None
    """`inputs` and `sources`, in the same form as in release.json; None before training has started."""
    digests: Mapping[str, str]
    """SHA-256 of recipe, token store and tokenizer."""
    parameters: int | None
    """Number of parameters; None before the vocabulary size is known."""
    checkpoint: Json
    """State of the newest checkpoint; empty without a checkpoint."""
    releases: list[tuple[str, Json]]
    """Folder name and metadata of each release, in the order of their steps."""
    evaluations: list[tuple[str, Json]]
    """Label, such as `release, step 100`, and content of each evaluation of a release or a checkpoint, then those of
    each evaluation during training, oldest first."""
    scores: Mapping[str, list[dict[str, Any]]]
    """Result of `releases_table` for the run."""

    @property
    def name(self) -> str:
        """Name of the folder, which differs between runs of the same recipe."""
        return self.folder.resolve().name

    @property
    def listed_events(self) -> list[Json]:
        """All events except samples, which the page shows separately."""
        return [event for event in self.events if event["event"] != "sample"]

    @property
    def listed_evaluations(self) -> list[tuple[str, Json]]:
        """Evaluations in tables: all of releases and checkpoints, and the newest ones during training."""
        during = [pair for pair in self.evaluations if pair[0].startswith(DURING_TRAINING)]
        others = self.evaluations[: len(self.evaluations) - len(during)]
        return others + during[-MAX_EVALUATIONS:]

    @property
    def ranks(self) -> list[int]:
        """World sizes with which the run was started, in order and without duplicates."""
        return list(dict.fromkeys(event["ranks"] for event in self.events if event.get("ranks")))

    @property
    def hardware(self) -> list[Json]:
        """Records of the hardware that the run trained on; empty before the first checkpoint."""
        states = [self.checkpoint, *(metadata for _, metadata in reversed(self.releases))]
        return next((state["hardware"] for state in states if state.get("hardware")), [])

    @property
    def wall_clock_seconds(self) -> float | None:
        """Seconds from the first event to the last event; None without events.

        While the run is training, the newest row of the metrics counts as the end if it is later than the last event.
        """
        if not self.events:
            return None
        start, end = (float(self.events[place]["time"]) for place in (0, -1))
        if self.state.state == "running" and self.state.row_age_seconds is not None:
            end = max(end, self.read_at - self.state.row_age_seconds)
        return max(0.0, end - start)


class MetricsReader:
    """Reader of a run's metrics for a live page: each call of `read` reads only the new rows."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.accumulator = run, MetricsAccumulator()
        self.offset, self.step, self.file = 0, 0, (0, 0)
        """Number of bytes read, newest step, and device and inode of the file."""

    def read(self) -> MetricsSummary:
        """Return the summary of all rows. Raises InputError, with the line number, for an invalid row."""
        path = self.run.metrics_path
        if path.is_file():
            status = path.stat()
            if (status.st_dev, status.st_ino) != self.file or status.st_size < self.offset:  # the run was resumed
                self.offset, self.step, self.accumulator = 0, 0, MetricsAccumulator()
                self.file = (status.st_dev, status.st_ino)
        while True:
            rows, offset = rows_since(path, self.offset)
            if not all(map(_is_valid, rows)):
                raise InputError(_describe_invalid_row(self.run))
            if not rows:
                return self.accumulator.summary()
            self.accumulator.add(row for row in rows if self._is_next(row))
            self.offset = offset

    def _is_next(self, row: Json) -> bool:
        """Return whether a row is after all rows before it; a run whose log is damaged may repeat steps."""
        is_next = bool(row["step"] > self.step)
        self.step = max(self.step, row["step"])
        return is_next


def read_run(folder: Path, metrics: MetricsReader | None = None) -> RunData:
    """Read a run. Raises InputError if the folder is not a run, or if one of its files is damaged.

    `metrics` is a reader of the run that is kept between calls, so that only new rows are read.
    """
    run, now = RunDir.open(folder), time.time()
    recipe, newest, releases = run.recipe(), run.newest_checkpoint(), run.releases.releases()
    manifest, checkpoint = read_json_if_exists(run.store_manifest_path), newest.state() if newest else {}
    evaluated = [("release", release.evaluation()) for release, _ in releases]
    evaluated += [("checkpoint", read_json_if_exists(found.evaluation_path)) for found in run.checkpoints()]
    evaluated += [(DURING_TRAINING, evaluation) for evaluation in run.evaluations()]
    digests, store, vocab_size = {"recipe": recipe.digest}, None, checkpoint.get("vocab_size")
    if manifest:
        digests["token store, its manifest"] = sha256_of(run.store_manifest_path)
        digests["tokenizer"] = checkpoint.get("tokenizer") or manifest["tokenizer"]["digest"]
        vocab_size = vocab_size or manifest["tokenizer"]["vocab_size"]
        store = _with_origins(summarize_store(manifest, recipe), [metadata for _, metadata in releases])
    return RunData(
        folder=folder,
        recipe=recipe,
        read_at=now,
        state=read_run_status(run, now),
        metrics=(metrics or MetricsReader(run)).read(),
        events=list(run.events()),
        store=store,
        digests=digests,
        parameters=num_parameters(recipe.model, vocab_size) if vocab_size else None,
        checkpoint=checkpoint,
        releases=[(release.path.name, metadata) for release, metadata in releases],
        evaluations=[
            (f"{kind}, step {evaluation['step']:,}", evaluation)
            for kind, evaluation in evaluated
            if evaluation and evaluation["step"] is not None
        ],
        scores=releases_table(run.releases),
    )


def _is_valid(row: Json) -> bool:
    numbers = all(isinstance(row.get(name), int | float | None) for name in metric_names(row))
    return numbers and isinstance(row["step"], int) and isinstance(row.get("tokens"), int)


def _describe_invalid_row(run: RunDir) -> str:
    for number, row in numbered_rows(run.metrics_path):
        place, remedy = f"{run.metrics_path}:{number}", "correct or delete the line"
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return f"{place}: not a row with a step; {remedy}"
        for name in metric_names(row):
            if not isinstance(row.get(name), int | float | None):
                return f"{place}: {name} is {row[name]!r}, not a number; {remedy}"
        if not isinstance(row.get("tokens"), int):
            return f"{place}: the row has no token count; {remedy}"
    return f"{run.metrics_path}: rows changed while they were read; run the command again"


def _with_origins(store: dict[str, Any], releases: list[Json]) -> dict[str, Any]:
    """For sources whose raw files were deleted, add the origins that the metadata of earlier releases contains."""
    for metadata in releases:
        for name, source in metadata["store"]["sources"].items():
            if name in store["sources"] and store["sources"][name]["splits"] == source["splits"]:
                store["sources"][name]["origin"] = store["sources"][name]["origin"] or source["origin"]
    return store


@dataclass(frozen=True)
class Table:
    """Table of text cells. `kinds` contains the CSS class of each row."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()
    """Indices of the right-aligned columns."""
    hashes: tuple[int, ...] = ()
    """Indices of the monospaced columns, whose text may break at any character."""
    kinds: Sequence[str] = ()


def data_table(run: RunData) -> Table | None:
    """Return the table of sources and splits; None if the run has no store yet."""
    if run.store is None:
        return None
    return Table(DATA_COLUMNS, list(data_rows(run.store["sources"], run.recipe)), numbers=(2, 4, 5), hashes=(6,))


def task_table(run: RunData, newest_only: bool) -> Table:
    """Return the table of all scores, or of the newest step's scores, ordered by task."""
    newest = max((evaluation["step"] for _, evaluation in run.evaluations), default=0)
    found = [(name, scores) for name, scores in run.listed_evaluations if scores["step"] == newest or not newest_only]
    found.sort(key=lambda pair: pair[1]["step"])
    rows = [(cells[0], name, *cells[1:]) for name, evaluation in found for cells in score_rows(evaluation)]
    tasks = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: tasks.index(row[0]))
    return Table((SCORE_COLUMNS[0], "model", *SCORE_COLUMNS[1:]), rows, numbers=(2, 3, 4))


def score_table(run: RunData) -> Table:
    """Return the table of the run's releases and the baselines."""
    rows = list(release_rows(run.scores))
    kinds = ["own" if "step" in row else "" for row, _ in rows]
    return Table(RELEASE_COLUMNS, [cells for _, cells in rows], numbers=(2, 3, 4), kinds=kinds)


def release_table(run: RunData) -> Table:
    """Return the table of releases, with the size of each format."""
    rows = []
    for folder, metadata in run.releases:
        sizes: Counter[str] = Counter()
        for path, file in metadata["files"].items():
            sizes[path.partition("/")[0]] += file["bytes"]
        formats = ", ".join(f"{name} {format_bytes(sizes[name])}" for name in metadata["formats"])
        step, tokens, files = (f"{count:,}" for count in (metadata["step"], metadata["tokens"], len(metadata["files"])))
        rows.append((step, tokens, metadata["date"], f"releases/{folder}", formats, files))
    return Table(("step", "tokens", "date", "folder", "formats, sizes", "files"), rows, numbers=(0, 1, 5))


def file_table(metadata: Json) -> Table:
    """Return the table of all files of a release."""
    rows = [(path, f"{file['bytes']:,}", file["sha256"]) for path, file in sorted(metadata["files"].items())]
    return Table(("file", "bytes", "SHA-256"), rows, numbers=(1,), hashes=(2,))


def event_table(events: Sequence[Event]) -> Table:
    """Return the table of events, in the given order."""
    rows = [
        (format_timestamp(event["time"]), f"{event['step']:,}", event["event"], describe_event(event))
        for event in events
    ]
    kinds = [event_category(event) for event in events]
    return Table(("time (UTC)", "step", "event", "details"), rows, numbers=(1,), kinds=kinds)


def select_notable_events(events: Sequence[Event]) -> list[Event]:
    """Select at most MAX_NOTABLE_EVENTS non-routine events: prefer problems, then rare kinds, then recent events."""
    counts = Counter(event["event"] for event in events)
    notable = [event for event in events if event_category(event) != INFO]
    notable.sort(key=lambda event: (event_category(event) == PROBLEM, -counts[event["event"]]))
    return sorted(notable[-MAX_NOTABLE_EVENTS:], key=lambda event: event["time"])


def format_event_counts(events: Iterable[Event]) -> str:
    """Format the number of events by name: `start: 1, checkpoint: 14`."""
    return ", ".join(f"{name}: {count:,}" for name, count in Counter(event["event"] for event in events).items())


def describe_checkpoints(events: Iterable[Event]) -> str | None:
    """Return a sentence with the number and duration of the checkpoints, or None without checkpoints."""
    found = [event for event in events if event["event"] == "checkpoint"]
    if not found:
        return None
    first, last = found[0]["step"], found[-1]["step"]
    steps = f"step {first:,}" if len(found) == 1 else f"steps {first:,} to {last:,}"
    summary = f"{len(found):,} checkpoint{'s' * (len(found) > 1)}, {steps}"
    written, stalled = (_format_spread(found, name) for name in ("seconds", "stall_seconds"))
    return f"{summary}; written in {written}, training stalled for {stalled}." if written and stalled else f"{summary}."


def _format_spread(events: Sequence[Event], name: str) -> str | None:
    """Format the median and the range of a duration over the given events."""
    values = [event[name] for event in events if event.get(name) is not None]
    if not values:
        return None
    median, low, high = map(format_duration_precise, (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} (median; {low} to {high})"


def lineage_table(run: RunData) -> Table:
    """Return the table of lineage, from the raw files to the newest weights of the run."""
    rows: list[tuple[str, str]] = []
    if run.store:
        inputs = run.store["inputs"]
        rows.append(("raw files", f"{inputs['files']:,}, {inputs['bytes']:,} bytes"))
    rows += run.digests.items()
    initial = run.checkpoint.get("initial_weights")
    source = "; ".join([f"{initial['source']} {initial['digest']}", *initial.get("changed", [])]) if initial else ""
    rows.append(("initial weights", source or "drawn from the seed"))
    for folder, metadata in run.releases[-1:]:
        rows += [(f"{folder}, weights from {name}", commit) for name, commit in metadata["checkpoints"].items()]
        versions = ", ".join(f"{name} {number}" for name, number in metadata["versions"].items())
        rows.append((f"{folder}, exported with", versions))
    return Table(("from raw files to weights", "SHA-256, or description"), rows, hashes=(1,))


def unique_run_names(runs: Sequence[RunData]) -> list[str]:
    """Return a unique name for each run: the folder's name, or the path if several folders have the same name."""
    names, folders = [run.name for run in runs], [run.folder for run in runs]
    return [
        name if names.count(name) == 1 else f"{folder} ({number})" if folders.count(folder) > 1 else str(folder)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True), 1)
    ]


def difference_table(runs: Mapping[str, RunData]) -> Table:
    """Return the table of recipe fields, except for the name, that differ between runs."""
    fields = [run.recipe.model_dump(mode="json", exclude={"name"}) for run in runs.values()]
    rows = [
        (name, *(MISSING if value is None else str(value) for value in values)) for name, values in differences(*fields)
    ]
    return Table(("recipe field", *runs), rows)


def result_table(runs: Mapping[str, RunData]) -> Table:
    """Return the table of results, with a column for each run."""
    columns = [_results(run) for run in runs.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, MISSING) for column in columns)) for name in names]
    return Table(("", *runs), rows, numbers=tuple(range(1, len(columns) + 1)))


def _results(run: RunData) -> dict[str, str]:
    metrics, seconds = run.metrics, run.wall_clock_seconds
    scores = list(filter(None, map(release_score, run.scores["releases"])))
    return {
        "state": run.state.state,
        "parameters": f"{run.parameters:,}" if run.parameters else MISSING,
        "tokens seen": format_count(metrics.tokens),
        "training loss, last step (nats per token)": format_newest(run, "loss"),
        "validation loss (nats per token)": format_newest(run, "validation_loss"),
        "validation (bits per byte)": format_newest(run, "validation_bits_per_byte"),
        "tokens/s, median": format_median(run, "tokens_per_second", format_count),
        "MFU, median (on a CPU: share of the fastest matrix product)": format_median(run, "mfu", format_percent),
        "time in steps": format_duration_precise(metrics.seconds) if metrics.seconds else MISSING,
        "wall clock": format_duration_precise(seconds) if seconds else MISSING,
        "steps skipped": f"{metrics.num_skipped:,}",
        "HellaSwag acc_norm (per cent)": str(scores[-1]) if scores else MISSING,
        **{
            f"validation of {source} (bits per byte)": format_newest(run, f"validation_bits_per_byte/{source}")
            for source in metrics.sources
        },
        **{
            f"validation at positions {part} (bits per byte)": format_newest(
                run, f"validation_bits_per_byte_by_position/{part}"
            )
            for part in metrics.positions
        },
    }


def format_newest(run: RunData, metric: str) -> str:
    """Format the newest value of a metric with four decimals."""
    return f"{run.metrics.newest[metric][1]:.4f}" if metric in run.metrics.newest else MISSING


def format_median(run: RunData, metric: str, format_value: Callable[[float], str]) -> str:
    """Format the median of a metric over the run with `format_value`."""
    curve = run.metrics.curves[metric]
    return format_value(statistics.median(curve.mean.tolist())) if len(curve) else MISSING


def format_timestamp(seconds: float) -> str:
    """Format a time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
