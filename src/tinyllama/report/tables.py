"""A run's facts as tables: data, scores, releases, events, lineage.

Pure functions of what was read; no cell knows of HTML. The cells of data and scores are the model card's own, so that
the two never disagree.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tinyllama.evaluate.results import SCORE_COLUMNS, score_rows
from tinyllama.formatting import format_bytes, format_duration_precise
from tinyllama.release.card_data import DATA_HEAD, data_rows
from tinyllama.release.card_scores import RELEASE_HEAD, release_rows
from tinyllama.report.reading import Facts, Run
from tinyllama.runs.events import INFO, PROBLEM, Event, describe_event, event_category

MOST_EVENTS = 1000
"""In one list; events.jsonl has the others."""
FEW_EVENTS = 25
"""Are shown as they are, without a summary."""


@dataclass(frozen=True)
class Table:
    """Cells of text; `kinds` marks rows, in their order, as what they are to a reader."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()
    """Columns that are set flush right."""
    hashes: tuple[int, ...] = ()
    """Columns that are set in a fixed width and may break anywhere."""
    kinds: Sequence[str] = ()


def data_table(run: Run) -> Table | None:
    """Each source and split, as in the card; None where the run has no store yet."""
    if run.store is None:
        return None
    return Table(DATA_HEAD, list(data_rows(run.store["sources"], run.recipe)), numbers=(2, 4, 5), hashes=(6,))


def task_table(run: Run, newest_only: bool) -> Table:
    """Every score that was measured of this run, task by task, or only those of the model of the newest step."""
    newest = max((scores["step"] for _, scores in run.evaluations), default=0)
    found = [(what, scores) for what, scores in run.evaluations if scores["step"] == newest or not newest_only]
    found.sort(key=lambda pair: pair[1]["step"])
    rows = [(cells[0], what, *cells[1:]) for what, scores in found for cells in score_rows(scores)]
    tasks = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: tasks.index(row[0]))
    return Table((SCORE_COLUMNS[0], "model", *SCORE_COLUMNS[1:]), rows, numbers=(2, 3, 4))


def score_table(run: Run) -> Table:
    """The run's releases beside the baselines."""
    found = list(release_rows(run.table))
    kinds = ["own" if "step" in row else "" for row, _ in found]
    return Table(RELEASE_HEAD, [cells for _, cells in found], numbers=(2, 3, 4), kinds=kinds)


def release_table(run: Run) -> Table:
    """Each release with the size of each of its formats."""
    head = ("step", "tokens", "of", "folder", "formats, their sizes", "files")
    return Table(head, [_release(folder, facts) for folder, facts in run.releases], numbers=(0, 1, 5))


def _release(folder: str, facts: Facts) -> tuple[str, ...]:
    sizes = sizes_of(facts)
    formats = ", ".join(f"{name} {format_bytes(sizes.get(name, 0))}" for name in facts["formats"])
    return (
        f"{facts['step']:,}", f"{facts['tokens']:,}", facts["date"], f"releases/{folder}", formats,
        f"{len(facts['files']):,}",
    )  # fmt: skip


def sizes_of(facts: Facts) -> Counter[str]:
    """Bytes of each folder of a release."""
    sizes: Counter[str] = Counter()
    for path, file in facts["files"].items():
        sizes[path.partition("/")[0]] += file["bytes"]
    return sizes


def file_table(facts: Facts) -> Table:
    """Every file of a release."""
    rows = [(path, f"{file['bytes']:,}", file["sha256"]) for path, file in sorted(facts["files"].items())]
    return Table(("file", "bytes", "SHA-256"), rows, numbers=(1,), hashes=(2,))


def event_table(events: Sequence[Event]) -> Table:
    """Events as they came."""
    rows = [
        (format_timestamp(event["time"]), f"{event['step']:,}", event["event"], describe_event(event))
        for event in events
    ]
    kinds = [event_category(event) for event in events]
    return Table(("when (UTC)", "step", "event", "what"), rows, numbers=(1,), kinds=kinds)


def select_notable_events(events: Sequence[Event]) -> list[Event]:
    """At most FEW_EVENTS that a reader must not miss: what went wrong, then the rest but routine, rare names first.

    A name that does not fit whole is left to the counts; where nothing that went wrong fits, its newest are taken.
    """
    counts = Counter(event["event"] for event in events if event_category(event) != INFO)
    wrong = {event["event"] for event in events if event_category(event) == PROBLEM}
    names, room = set(), FEW_EVENTS
    for name, count in sorted(counts.items(), key=lambda pair: (pair[0] not in wrong, pair[1])):
        if count <= room:
            names.add(name)
            room -= count
    if wrong and not names & wrong:
        return [event for event in events if event["event"] in wrong][-FEW_EVENTS:]
    return [event for event in events if event["event"] in names]


def events_to_list(events: Sequence[Event]) -> tuple[str, list[Event]]:
    """What a list of all events holds, in words, and they: too many go without checkpoints, then without the oldest."""
    if len(events) <= MOST_EVENTS:
        return f"All {len(events):,} events", list(events)
    others = [event for event in events if event["event"] != "checkpoint"]
    if len(others) <= MOST_EVENTS:
        return f"All {len(others):,} events but checkpoints", others
    return f"The newest {MOST_EVENTS:,} of {len(others):,} events, without checkpoints", others[-MOST_EVENTS:]


def format_event_counts(events: Iterable[Event]) -> str:
    """How many of each kind: `start: 1, checkpoint: 14`."""
    return ", ".join(f"{name}: {count:,}" for name, count in Counter(event["event"] for event in events).items())


def checkpoints_in_words(events: Iterable[Event]) -> str | None:
    """How many checkpoints there were and how long they took; None without any."""
    found = [event for event in events if event["event"] == "checkpoint"]
    if not found:
        return None
    words = f"{len(found):,} checkpoint{'s' * (len(found) > 1)}, {_steps(found)}"
    took, stood = (_spread(found, name) for name in ("seconds", "stall_seconds"))
    return f"{words}; written in {took}, while training stood still for {stood}." if took and stood else f"{words}."


def _steps(events: Sequence[Event]) -> str:
    first, last = events[0]["step"], events[-1]["step"]
    return f"step {first:,}" if len(events) == 1 else f"steps {first:,} to {last:,}"


def _spread(events: Sequence[Event], name: str) -> str | None:
    """The median, and between what."""
    values = [event[name] for event in events if event.get(name) is not None]
    if not values:
        return None
    middle = format_duration_precise(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} (median; {format_duration_precise(min(values))} to {format_duration_precise(max(values))})"


def lineage_table(run: Run) -> Table:
    """From raw files to weights, as far as the run has come."""
    rows: list[tuple[str, str]] = []
    if run.store:
        inputs = run.store["inputs"]
        rows.append(("raw files", f"{inputs['files']:,}, {inputs['bytes']:,} bytes"))
    rows += run.digests.items()
    initial = run.checkpoint.get("initial_weights")
    rows.append(("initial weights", f"{initial['source']} {initial['digest']}" if initial else "drawn from the seed"))
    for folder, facts in run.releases[-1:]:
        rows += [(f"{folder}, weights from {name}", commit) for name, commit in facts["checkpoints"].items()]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        rows.append((f"{folder}, exported with", versions))
    return Table(("from raw file to weights", "SHA-256, or what it is"), rows, hashes=(1,))


def format_timestamp(seconds: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def wall_clock(run: Run) -> float | None:
    """Seconds from the first event to the last, or of a running run to its newest row; None before it has begun."""
    if not run.events:
        return None
    begun, ended = (float(run.events[place]["time"]) for place in (0, -1))
    if run.state.state == "running" and run.state.row_age_seconds is not None:
        ended = max(ended, run.read_at - run.state.row_age_seconds)
    return max(0.0, ended - begun)


def differing(fields: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Names of the fields that are not the same in all runs, in the order of the recipe."""
    names = dict.fromkeys(name for of_run in fields.values() for name in of_run)
    return [name for name in names if len({repr(of_run.get(name, "")) for of_run in fields.values()}) > 1]
