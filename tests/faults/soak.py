"""Soak test, `make soak`: all stages in a loop, with random processes killed at random times.

Each round runs all stages in its own folder, then `soak_checks` compares it with a round without kills. The seed
determines what is killed, when and how; what the kill interrupts also depends on the machine.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.faults.process_groups import LIMIT_SECONDS, TORCHRUN, ProcessGroup, send_signal, start_group
from tests.faults.soak_checks import assert_same_results

STEPS, MILESTONES, BATCH_TOKENS = 600, (130, 400, 600), 6 * 64
RUN = Path("runs/small")
STAGES = ("tokenizer", "prepare", "train", "release")
NUM_TASKS = 12
"""Tasks of prepare, one per file."""
MAX_KILLS = 12
"""Kills per stage and round; after them the stage may finish, so that every round ends."""
ALREADY_TRAINED = "tokenizer is there already"
"""Message of `tokenizer train` that was killed after its last byte and therefore fails when it is repeated."""
Kills = Counter[tuple[str, str, str]]
"""Number of kills by stage, process and signal."""


def command_of(stage: str, ranks: int, chance: random.Random) -> list[str]:
    """Return the command of a stage, with training on so many ranks."""
    program, launcher = ["-m", "tinyllama"], [sys.executable]
    match stage:
        case "tokenizer":
            arguments = ["tokenizer", "train", "recipe.yaml", "--vocab-size", "600"]
        case "release":
            arguments = ["release", str(RUN), "--step", str(STEPS), "--force", "--formats", "huggingface"]
        case _:
            arguments = [stage, "recipe.yaml"]
    if stage == "train" and ranks > 1:
        launcher = [*TORCHRUN, f"--nproc_per_node={ranks}", f"--max-restarts={chance.choice((0, 2))}"]
    return [*launcher, *program, *arguments]


def write_raw_text(folder: Path) -> None:
    """Write the text that all rounds share, in one file per task."""
    texts = python_sources(150)
    for number in range(NUM_TASKS - 1):
        write_jsonl(folder / f"modules/{number:02d}.jsonl", texts[number * 12 :] + texts)
    write_jsonl(folder / "lines/a.jsonl", [line for text in texts[:40] for line in text.splitlines() if line.strip()])


def write_round_folder(folder: Path, raw: Path) -> None:
    """Write a round's folder and its recipe, whose paths are relative, so that the files of all rounds are equal."""
    folder.mkdir(parents=True)
    (folder / "raw").symlink_to(raw)
    fields = small_recipe(Path())
    fields["data"]["workers"] = 2
    fields["train"] |= {"tokens": STEPS * BATCH_TOKENS, "validate_every_steps": 50}
    at_tokens = [step * BATCH_TOKENS for step in MILESTONES]
    fields["release"] = {"at_tokens": at_tokens, "tasks": [], "formats": ["huggingface"]}
    fields["track"] = {"trackio": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def run_reference_round(folder: Path, raw: Path, ranks: int) -> dict[str, float]:
    """Run a round without kills; return the seconds of each stage."""
    write_round_folder(folder, raw)
    seconds = {}
    for stage in STAGES:
        start = time.monotonic()
        with start_group(command_of(stage, ranks, random.Random(0)), folder) as group:
            assert group.process.wait(LIMIT_SECONDS) == 0, group.output.read_text()
        seconds[stage] = time.monotonic() - start
    return seconds


def run_with_kills(folder: Path, stage: str, ranks: int, seconds: float, chance: random.Random, kills: Kills) -> int:
    """Start a stage until it ends well, and kill its processes meanwhile; return the number of starts."""
    left = MAX_KILLS
    for starts in range(1, 2 * MAX_KILLS):
        killed_before = kills.total()
        with start_group(command_of(stage, ranks, chance), folder) as group:
            while left and is_running_after(group, chance.random() * 0.9 * seconds):
                left -= kill_one(group, stage, chance, kills)
            assert not is_running_after(group, LIMIT_SECONDS), f"{stage} hangs: {group.output.read_text()[-3000:]}"
            output, status = group.output.read_text(), group.process.returncode
            group.wait_for_orphans()
            assert group.is_torchrun or "Traceback" not in output, output
            if status == 0 or ALREADY_TRAINED in output:
                return starts
            assert kills.total() > killed_before, f"{stage} failed, status {status}: {output[-3000:]}"
    raise AssertionError(f"{stage} does not finish: {output[-3000:]}")


def is_running_after(group: ProcessGroup, seconds: float) -> bool:
    """Wait for the end of a command; return whether it still runs after so many seconds."""
    with suppress(subprocess.TimeoutExpired):
        group.process.wait(seconds)
    return group.is_running()


def kill_one(group: ProcessGroup, stage: str, chance: random.Random, kills: Kills) -> bool:
    """Send SIGKILL or SIGTERM to one of the processes; return whether it still existed."""
    members = group.members()
    process = chance.choice(sorted(members) or [group.process.pid])
    number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    is_sent = send_signal(process, number)
    if is_sent:
        kills[stage, members.get(process, "the command"), number.name] += 1
    return is_sent


def soak(folder: Path, minutes: float, seed: int) -> list[str]:
    """Run rounds until the time is over, at least one; return the summary. Raises AssertionError for a loss."""
    raw, kills, starts, start = folder / "raw", Kills(), Counter[str](), time.monotonic()
    write_raw_text(raw)
    references: dict[int, tuple[Path, dict[str, float]]] = {}
    rounds: list[str] = []
    while not rounds or time.monotonic() - start < 60 * minutes:
        number = len(rounds)
        ranks, chance = 1 + number % 2, random.Random(f"{seed} {number}")
        if ranks not in references:
            reference = folder / f"reference-{ranks}"
            references[ranks] = reference, run_reference_round(reference, raw, ranks)
        reference, seconds = references[ranks]
        own = folder / f"round-{number}"
        write_round_folder(own, raw)
        for stage in STAGES:
            starts[stage] += run_with_kills(own, stage, ranks, seconds[stage], chance, kills)
            print(f"round {number}, {ranks} ranks: {stage} done, {kills.total()} kills", flush=True)
        rounds.append(f"round {number}: {assert_same_results(own, reference, RUN, STEPS, MILESTONES)}")
        shutil.rmtree(own)
    lines = [f"{len(rounds)} rounds in {(time.monotonic() - start) / 60:.1f} minutes, {kills.total()} kills"]
    lines += [f"{stage}: started {count} times" for stage, count in starts.items()]
    return [*lines, *(f"{' '.join(key)}: {count}" for key, count in sorted(kills.items())), *rounds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the seed, run the rounds and print the summary; the folder of a failed round is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"soak --minutes {options.minutes:g} --seed {options.seed}, in {folder}", flush=True)
    print("\n".join(soak(folder, options.minutes, options.seed)), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
