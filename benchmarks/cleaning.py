"""Speed of the steps of `clean: web` next to those of datatrove with spaCy, on one core.

The programs process the English text of benchmarks/texts.py in memory, each in a new process. The speed is the CPU time
of a step alone. The search for duplicates is in benchmarks/deduplication.py.

    python benchmarks/cleaning.py
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from cleaning_peers import CHAIN
from measuring import OURS, Measure, Program, options, take_turns, write_measures
from peers import make_peer, version_of
from texts import make_corpus

HERE = Path(__file__).parent
SETTINGS = {
    OURS: "`clean: web`, without block lists, which need URLs, and without deduplication",
    "datatrove": "filters and PIIFormatter with FineWeb's settings, words of spaCy",
}


def main() -> None:
    """Print the speed of each step."""
    arguments = parse_arguments()
    work = arguments.work.resolve()
    files = make_corpus(work / "prepare", arguments.text, 30) / "prose"
    pythons = {OURS: sys.executable, "datatrove": make_peer(work, "deduplication")}
    turns = take_turns({name: partial(turn, name, pythons, files, arguments) for name in pythons}, arguments.rounds)
    steps = turns[OURS][0]["steps"]
    write_measures(arguments.json, [measure(step, turns, pythons, arguments) for step in steps])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--text", type=Path, help="folder with prose/ and code/, each with UTF-8 text files")
    parser.add_argument("--megabytes", type=float, default=2, help="megabytes of text (default: %(default)s)")
    return parser.parse_args()


def turn(name: str, pythons: dict[str, Any], files: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a program once, and return what it printed."""
    command = [pythons[name], HERE / "cleaning_peers.py", name, files, str(arguments.megabytes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    step: str, turns: dict[str, list[dict[str, Any]]], pythons: dict[str, Any], arguments: argparse.Namespace
) -> Measure:
    """Return the speed of a step of all programs that have it."""
    programs = {
        name: Program(
            version=version_of(pythons[name], name),
            settings=SETTINGS[name],
            values=[found["bytes"] / 1e6 / found["steps"][step]["seconds"] for found in own],
            found=f"{own[0]['steps'][step]['kept']:,} documents kept",
        )
        for name, own in turns.items()
        if step in own[0]["steps"]
    }
    what = "Each document until the first filter that drops it." if step == CHAIN else "Each document."
    return Measure(
        section="cleaning",
        name=f"{step} of English",
        unit="MB/s",
        more_is_better=True,
        how=f"{what} {arguments.megabytes:g} MB of English in memory, CPU time of one core.",
        not_shown="Reading files, block lists, deduplication, tokenization; text of other kinds, which is dropped at "
        "another filter; datatrove's language identification, whose model is a download.",
        programs=programs,
    )


if __name__ == "__main__":
    main()
