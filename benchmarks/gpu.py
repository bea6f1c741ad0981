"""Checks and measurements of tinyllama on this machine's GPU, in at most eight minutes: `make check-gpu`.

Each part runs in a child process with a time limit, so that a crash or a hang of one part does not end the others. The
time that a part does not use is added to the limits of later parts. A part writes a row per check or measurement as
soon as it has one; rows from before a crash are kept. Nothing is downloaded. Results are written to --out as
results.json and results.md. The exit status is 1 if a check or a part failed.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts attention speed
    python benchmarks/gpu.py --dry-run      # the same parts on a CPU at tiny sizes, in about two minutes
"""

import argparse
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
"""The checkout, or the folder of a bundle."""
Row = dict[str, Any]
"""Result of one check or measurement, by column name. `passed` is absent for measurements."""


class Part(NamedTuple):
    """A group of checks or measurements that share a process."""

    module: str
    function: str
    limit_seconds: float
    title: str
    note: str = ""


SPEED_NOTE = (
    "MFU = tokens/s x FLOPs per token / (FLOP/s of the data sheet, or of a measured matrix product). FLOPs per token = "
    "6 x (parameters - input embedding) + 6 x layers x heads x head_dim x sequence length, which counts causal "
    "attention. No row has a document mask."
)
INPUTS = Part("gpu_training", "inputs", 25, "Tokenizer and store of the part `training`")
"""Runs before the parts, and only in a checkout: a bundle has the tokenizer and the store."""
BUNDLED_INPUTS = ROOT / "benchmarks" / "gpu-inputs"
PARTS = {
    "environment": Part("gpu_correctness", "environment", 40, "Versions, devices and matrix products"),
    "attention": Part("gpu_correctness", "attention", 30, "Small model compared with float64 on the CPU"),
    "training": Part("gpu_training", "training", 100, "`tinyllama train`: losses, repeatability, resume, checkpoints"),
    "sharding": Part("gpu_correctness", "sharding", 25, "FSDP2 on one rank compared with an unsharded model"),
    "speed": Part("gpu_speed", "speed", 130, "Training speed of the 1.1B model", SPEED_NOTE),
    "small": Part("gpu_speed", "small", 20, "Training speed of the 120M model", SPEED_NOTE),
    "profile": Part("gpu_speed", "profile", 25, "Time per kernel group of a 1.1B step"),
    "loss": Part("gpu_loss", "head_loss", 20, "Loss of the output head at the shape of a 1.1B micro-batch"),
    "inference": Part("gpu_speed", "inference", 20, "Scoring and generation with and without cuDNN attention"),
    "peers": Part("gpu_peers", "peers", 45, "Other libraries at the same shape"),
}
"""All parts, in order of execution. Their limits and that of `INPUTS` add up to eight minutes."""
DRY_RUN_LIMIT_FACTOR = 10
"""A CPU that other jobs use needs longer than a GPU even for tiny sizes."""


def main() -> int:
    """Run the parts, print their tables, and return the exit status."""
    begun = deadline = time.monotonic()
    arguments = parse_arguments()
    if missing := [name for name in ("torch", "numpy", "pydantic", "tinyllama") if find_spec(name) is None]:
        raise SystemExit(f"{sys.executable}: cannot import {', '.join(missing)}; see benchmarks/gpu_bundle.py")
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {name: PARTS[name] for name in arguments.parts}
    if "training" in parts and not BUNDLED_INPUTS.is_dir():
        os.environ["GPU_INPUTS"] = str(arguments.out.resolve() / "inputs")
        parts = {"inputs": INPUTS} | parts
    run = describe_run()
    results: list[Row] = []
    for name, part in parts.items():
        deadline += part.limit_seconds * (DRY_RUN_LIMIT_FACTOR if arguments.dry_run else 1)
        results.append(run_part(name, part, arguments.out, "cpu" if arguments.dry_run else "cuda", deadline))
        print(markdown_section(results[-1]), flush=True)
        run["seconds"] = round(time.monotonic() - begun, 1)
        (arguments.out / "results.json").write_text(json.dumps(run | {"parts": results}, indent=1) + "\n")
        about = [f"- {key}: {value}" for key, value in run.items()]
        (arguments.out / "results.md").write_text("\n".join([*about, "", *map(markdown_section, results)]))
    failed = [result["part"] for result in results if not has_passed(result)]
    print(f"failed: {', '.join(failed)}" if failed else "all parts passed")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="results folder (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="use the CPU and tiny sizes")
    return parser.parse_args()


def describe_run() -> Row:
    """Return the date, the command, and the version and commit of tinyllama."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "tinyllama": version("tinyllama"),
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of the checkout, or that of the checkout that made this bundle; empty if there is no git."""
    in_bundle = ROOT / "commit.txt"
    if in_bundle.is_file():
        return in_bundle.read_text()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def run_part(name: str, part: Part, out: Path, device: str, deadline: float) -> Row:
    """Run a part in a child process; return its rows, its duration and the problem that ended it, if any.

    At `deadline`, a value of `time.monotonic`, the part is killed together with the processes that it started.
    """
    rows, log = out / f"{name}.jsonl", out / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(os.getpid())]
    command += [part.module, part.function, str(rows), device]
    environment = os.environ | {"GPU_DEADLINE": str(deadline)}
    if device == "cpu":  # several threads would wait for each other while other jobs use the cores
        environment["OMP_NUM_THREADS"] = "1"
    begun = time.monotonic()
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=environment, start_new_session=True) as process,
    ):
        try:
            status: int | None = process.wait(max(0.0, deadline - begun))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
    problem = ""
    if status is None:
        problem = f"stopped at its limit, after {deadline - begun:.0f} s"
    elif status:
        problem = f"{format_status(status)}: {last_line(log)}"
    return {
        "part": name,
        "title": part.title,
        "note": part.note,
        "seconds": round(time.monotonic() - begun, 1),
        "problem": problem,
        "rows": read_rows(rows),
    }


def format_status(status: int) -> str:
    """Format a child's status, which is the negative number of the signal that ended it, if any."""
    if status > 0:
        return f"exit status {status}"
    names = {number.value: number.name for number in signal.Signals}  # most real-time signals have no name
    return f"signal {names.get(-status, -status)}"


def read_rows(path: Path) -> list[Row]:
    """Read a part's rows, except a last line that the part had not completed when it was killed."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_line(log: Path) -> str:
    """Return the last line of a part's log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def run_child(parent: str, module: str, function: str, rows: str, device: str) -> None:
    """Run a part in this process and write each row to a file when the part yields it."""
    from tinyllama.processes import set_parent_death_signal  # noqa: PLC0415 - `main` reports if tinyllama is missing

    set_parent_death_signal(int(parent))
    part: Callable[[str], Iterator[Row]] = getattr(importlib.import_module(module), function)
    with Path(rows).open("w") as file:
        for row in part(device):
            file.write(json.dumps(json_row(row), allow_nan=False) + "\n")
            file.flush()


def json_row(row: Row) -> Row:
    """Return a row with strings for NaN and infinity, which are not JSON and fail the row's check."""
    texts = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return row | texts | ({"passed": False} if texts and "passed" in row else {})


def has_passed(result: Row) -> bool:
    """Return whether a part reached its end and all of its checks passed."""
    return not result["problem"] and all(row.get("passed") is not False for row in result["rows"])


def markdown_section(result: Row) -> str:
    """Format the rows of a part as a Markdown table, with a heading, a note and the problem that ended the part."""
    lines = [f"## {result['title']}", "", f"{result['seconds']:g} s"]
    if result["note"]:
        lines += ["", result["note"]]
    if result["problem"]:
        lines += ["", f"**Failed**: {result['problem']}"]
    return "\n".join([*lines, "", *markdown_table(result["rows"]), ""])


def markdown_table(rows: Iterable[Row]) -> list[str]:
    """Format rows with a column per key, in the order of first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    table = [columns, ["---"] * len(columns)]
    table += [[format_cell(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in table]


def format_cell(value: object) -> str:
    """Format a value: three significant digits for numbers, yes or no for the outcome of a check."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "**no**"
        case float() if abs(value) >= 1000:
            return f"{value:,.0f}"
        case float():
            return f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        sys.exit(main())
