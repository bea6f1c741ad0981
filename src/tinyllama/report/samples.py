"""The samples of a report: for each prompt, a timeline of the completions from the first validation to the last."""

from collections.abc import Sequence

from tinyllama.formatting import MISSING
from tinyllama.report.content import Table
from tinyllama.runs.log import Event
from tinyllama.runs.samples import abbreviate_blank_lines, current_samples

MAX_VISIBLE = 6
"""Maximum number of completions of a prompt that are always visible."""


def timelines(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Return the samples of a run by prompt, in the order of their steps."""
    found: dict[str, list[Event]] = {}
    for event in current_samples(events):
        found.setdefault(str(event.get("prompt", "")), []).append(event)
    return found


def select(samples: Sequence[Event]) -> list[Event]:
    """Select at most MAX_VISIBLE completions of a prompt, evenly spaced from the first to the last."""
    count = min(len(samples), MAX_VISIBLE)
    return [samples[round(number * (len(samples) - 1) / max(1, count - 1))] for number in range(count)]


def table(samples: Sequence[Event]) -> Table:
    """Return the table of a prompt's completions, in the given order."""
    rows = [(f"{event['step']:,}", *(_cell(event.get(name)) for name in ("greedy", "sampled"))) for event in samples]
    return Table(("step", "most probable tokens", "sampled"), rows, numbers=(0,), kinds=["sample"] * len(rows))


def _cell(text: object) -> str:
    return abbreviate_blank_lines(str(text or "")).strip("\n") or MISSING
