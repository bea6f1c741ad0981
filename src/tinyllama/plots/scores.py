"""The values that a plot of scores shows: the baselines, and a readable range for the vertical axis."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyllama.formatting import format_count


def baseline_levels(releases: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the HellaSwag score of each baseline in the result of `releases_table`, by label.

    If a baseline has several rows, such as one per checkpoint, only the last row is returned.
    """
    last = {row["name"].partition(" step ")[0]: row for row in releases["baselines"] if row["hellaswag"] is not None}
    found = {}
    for name, row in last.items():
        after = "" if row["tokens"] is None else f" after {format_count(row['tokens'])} tokens"
        found[f"{name}{after} ({row['source'].partition(',')[0]})"] = row["hellaswag"]
    return found


def readable_range(low: float, high: float, levels: Iterable[float]) -> tuple[float, float]:
    """Extend the range from `low` to `high` to the levels that are at most its height away from it.

    Levels further away would flatten the scores, so a plot shows them as arrows.
    """
    height = high - low
    near = [level for level in levels if low - height <= level <= high + height]
    return min([low, *near]), max([high, *near])


def far_labels(levels: Mapping[str, float], low: float, high: float) -> list[str]:
    """Return a label with an arrow and the value for each level outside a range, the highest level first."""
    outside = {label: level for label, level in levels.items() if not low <= level <= high}
    return [
        f"{'↑' if outside[label] > high else '↓'} {label}: {outside[label]:.4g}"
        for label in sorted(outside, key=outside.__getitem__, reverse=True)
    ]
