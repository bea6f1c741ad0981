"""Shared code of the benchmarks: turns, ratios with their spread, and the format of results.

Programs take turns, in reverse order every second round, so that a busy machine slows all of them equally. A ratio
compares two values of one round. Scripts pass `Measure`s to benchmarks/bench.py with `--json`. Each program must have a
version and a value in every round; otherwise its ratio would be meaningless.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from tinyllama.files import write_json
from tinyllama.hardware import available_cpu_count, device_name, total_memory_bytes

OURS = "tinyllama"
DEFAULT_WORK = Path.home() / ".cache" / "tinyllama-benchmarks"
T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class Program(BaseModel):
    """The measurements of one program."""

    model_config = ConfigDict(extra="forbid")
    version: Text
    settings: Text
    values: list[Positive]
    """One value per round, in the measure's unit."""
    found: str = ""
    """Result of the checks other than time, or an empty string."""


class Measure(BaseModel):
    """One quantity, measured for tinyllama and its peers in the same rounds."""

    model_config = ConfigDict(extra="forbid")
    section: Text
    name: Text
    unit: Text
    more_is_better: bool
    how: Text
    """The measured quantity."""
    not_shown: Text
    """Aspects that the measure does not show."""
    programs: dict[str, Program]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if OURS not in self.programs:
            raise ValueError(f"{self.name}: {OURS} itself is missing")
        counts = {name: len(program.values) for name, program in self.programs.items()}
        if 0 in counts.values() or len(set(counts.values())) > 1:
            raise ValueError(f"{self.name}: every program needs a value in every round, got {counts}")
        return self


class Machine(BaseModel):
    """The machine of a run."""

    model_config = ConfigDict(extra="forbid")
    cpu: Text
    cores: int
    memory_bytes: int
    system: Text
    python: Text
    torch: Text
    product_gflops: list[Positive]
    """GFLOP/s of a bf16 2048^3 matrix product on all cores, before each section and after the last."""
    load: list[float]
    """Load average of the last minute before each section and after the last, including the benchmarks' processes."""


class Results(BaseModel):
    """A run of benchmarks/bench.py."""

    model_config = ConfigDict(extra="forbid")
    date: Text
    seconds: Positive
    machine: Machine
    measures: Annotated[list[Measure], Field(min_length=1)]


def read_results(path: Path) -> Results:
    """Read a results file. Raises SystemExit with the name of a missing field."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise SystemExit(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_measures(path: Path) -> list[Measure]:
    """Read the measures that a script wrote with --json."""
    return TypeAdapter(list[Measure]).validate_json(path.read_bytes())


def write_measures(path: Path | None, measures: Iterable[Measure]) -> None:
    """Print measures, and write them to the file of --json."""
    found = list(measures)
    print("\n".join(line for measure in found for line in lines_of(measure)), flush=True)
    if path is not None:
        write_json(path, [measure.model_dump() for measure in found])


def lines_of(measure: Measure) -> list[str]:
    """Format a measure, with a line per program."""
    width = max(map(len, measure.programs))
    lines = [f"{measure.section}: {measure.name}"]
    for name, program in measure.programs.items():
        line = f"  {name:{width}}  {spread(program.values)} {measure.unit}"
        line += "" if name == OURS else f"; {OURS} is {comparison(measure, name)}"
        lines.append(line)
    return lines


def ratios(measure: Measure, peer: str) -> list[float]:
    """Return the ratio of tinyllama to a peer per round; a ratio above 1 means that tinyllama is better."""
    pairs = zip(measure.programs[OURS].values, measure.programs[peer].values, strict=True)
    return [ours / theirs if measure.more_is_better else theirs / ours for ours, theirs in pairs]


def comparison(measure: Measure, peer: str, form: str | None = None) -> str:
    """Format the ratios of tinyllama to a peer with the adjective of the measure's unit."""
    factor = spread(ratios(measure, peer), form)
    if measure.unit in ("GB", "bits/byte"):
        return f"smaller by a factor of {factor}"
    return f"{factor} times as {'high' if measure.unit == '%' else 'fast'}"


def spread(values: Iterable[float], form: str | None = None) -> str:
    """Format the median, with the range if there are several values; three digits unless a format is given."""
    ordered = sorted(values)
    middle, *ends = (number(value, form) for value in (statistics.median(ordered), ordered[0], ordered[-1]))
    return f"{middle} ({'-'.join(ends)})" if len(ordered) > 1 else middle


def number(value: float, form: str | None = None) -> str:
    """Format a number, by default with at least three digits: 0.0123, 1.23, 12.3, 1,234."""
    if form is not None:
        return format(value, form)
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def take_turns(programs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every program in every round; return the results by program."""
    values: dict[str, list[T]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            values[name].append(programs[name]())
            print(f"round {turn + 1}: {name}: {values[name][-1]}", file=sys.stderr, flush=True)
    return values


def seconds_of(call: Callable[[], object]) -> float:
    """Return the time of a call, in seconds."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every script that bench.py calls."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="runs of each program (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="output file for the measures")
    return parser


def machine(product_gflops: list[float], load: list[float]) -> Machine:
    """Return this machine with its measurements."""
    return Machine(
        cpu=device_name(torch.device("cpu")),
        cores=available_cpu_count(),
        memory_bytes=total_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=version("torch"),
        product_gflops=product_gflops,
        load=load,
    )
