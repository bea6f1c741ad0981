"""Soak test, `make soak`: all stages in a loop, with random processes killed at random times.

Each round runs all stages in its own folder, then `soak_checks` compares it with a round without kills. The seed
determines what is killed, when and how; what the kill interrupts also depends on the machine.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tests.conftest import python_sources, small_recipe, write_jsonl
from tests.faults.process_groups import LIMIT_SECONDS, TORCHRUN, ProcessGroup, send_signal, start_group
from tests.faults.soak_checks import assert_same_results

STEPS, MILESTONES, BATCH_TOKENS = 600, (130, 400, 600), 6 * 64
RUN = Path("runs/small")
NUM_TASKS = 12
"""Tasks of prepare, one per file."""
_MAX_KILLS = 12
"""Kills per stage and round; after them the stage may finish, so that every round ends."""


@dataclass(frozen=True)
class Stage:
    """A command, its progress, and what it is doing."""

    name: str
    command: Callable[[random.Random], list[str]]
    progress: Callable[[Path], int]
    phase: Callable[[Path], str]
    """Current phase in a folder; empty before anything is written."""
    target_phases: tuple[str, ...]
    """Phases in which to kill."""
    finished_message: str = "\0"
    """Message of a command that was killed after its last byte and therefore fails when it is repeated."""


@dataclass
class Statistics:
    """Kills and recoveries so far."""

    kills: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """Number of kills by stage, phase, process and signal."""
    starts: Counter[str] = field(default_factory=Counter)
    rounds: list[str] = field(default_factory=list)
    recoveries: list[tuple[float, str, str]] = field(default_factory=list)
    """Seconds from a kill that ended a command until the stage progressed further; stage and phase of the kill."""


def count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def tokenizer_phase(folder: Path) -> str:
    return "writing" if (folder / "tokenizer").exists() else ""


def prepare_phase(folder: Path) -> str:
    if not (folder / "store/.work").exists():
        return ""
    return "tasks" if count(folder, "store/.work/completion_records/tokens/*.json") < NUM_TASKS else "finishing"


def train_phase(folder: Path) -> str:
    """Return what training and its sidecars are doing, as far as the files show it."""
    run = folder / RUN
    is_saving = any(not (path / "commit.json").exists() for path in run.glob("checkpoints/step-*"))
    is_releasing = count(run, "releases/.*.part") > 0
    phases = [name for name, is_active in (("saving", is_saving), ("releasing", is_releasing)) if is_active]
    steps = count_lines(run / "metrics.jsonl")
    if not phases and not steps:
        return ""
    return ", ".join(phases) or ("after the last step" if steps >= STEPS else "steps")


def release_phase(folder: Path) -> str:
    return "writing" if count(folder, f"{RUN}/releases/.*.part") else "before or after"


def tinyllama(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tinyllama", *arguments]


def build_stages(ranks: int) -> list[Stage]:
    """Return all stages, with training on so many ranks."""

    def train(chance: random.Random) -> list[str]:
        restarts = f"--max-restarts={chance.choice((0, 2))}"
        launcher = [*TORCHRUN, f"--nproc_per_node={ranks}", restarts] if ranks > 1 else [sys.executable]
        return [*launcher, "-m", "tinyllama", "train", "recipe.yaml"]

    release = tinyllama("release", str(RUN), "--step", str(STEPS), "--force", "--formats", "huggingface")
    return [
        Stage(
            "tokenizer",
            lambda _: tinyllama("tokenizer", "train", "recipe.yaml", "--vocab-size", "600"),
            lambda folder: count(folder, "tokenizer/*"),
            tokenizer_phase,
            ("writing",),
            "tokenizer is there already",
        ),
        Stage(
            "prepare",
            lambda _: tinyllama("prepare", "recipe.yaml"),
            lambda folder: count(folder, "store/.work/completion_records/tokens/*.json"),
            prepare_phase,
            ("tasks", "finishing"),
        ),
        Stage(
            "train",
            train,
            lambda folder: (
                count_lines(folder / RUN / "metrics.jsonl") + count(folder, f"{RUN}/releases/step-*/release.json")
            ),
            train_phase,
            ("saving", "releasing", "steps", "after the last step"),
        ),
        Stage("release", lambda _: release, lambda folder: 0, release_phase, ("writing",)),
    ]


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
    fields["release"] = {
        "at_tokens": [step * BATCH_TOKENS for step in MILESTONES],
        "tasks": [],
        "formats": ["huggingface"],
    }
    fields["track"] = {"trackio": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))


def run_reference_round(folder: Path, raw: Path, ranks: int) -> dict[str, float]:
    """Run a round without kills; return the seconds of each stage."""
    write_round_folder(folder, raw)
    seconds = {}
    for stage in build_stages(ranks):
        start = time.monotonic()
        with start_group(stage.command(random.Random(0)), folder) as group:
            assert group.process.wait(LIMIT_SECONDS) == 0, group.output.read_text()
        seconds[stage.name] = time.monotonic() - start
    return seconds


class KillingRunner:
    """Runs a stage again and again while killing its processes, until it ends well."""

    def __init__(
        self, folder: Path, stage: Stage, seconds: float, chance: random.Random, statistics: Statistics
    ) -> None:
        self.folder, self.stage, self.seconds, self.chance, self.statistics = folder, stage, seconds, chance, statistics
        self.ended: tuple[float, int] | None = None
        """Time of the kill that ended the command, and the progress then, until the stage has progressed further."""
        self.phase, self.kills = "", 0

    def run(self) -> None:
        """Start the command until it ends well."""
        for _ in range(5 * _MAX_KILLS):
            self.statistics.starts[self.stage.name] += 1
            kills_before = self.kills
            with start_group(self.stage.command(self.chance), self.folder) as group:
                while group.is_running() and self.kills < _MAX_KILLS and self._wait_for_moment(group):
                    self._kill_one(group)
                self._wait(group, time.monotonic() + LIMIT_SECONDS, lambda: False)
                ended = time.monotonic()
                output, status = group.output.read_text(), group.process.poll()
                assert status is not None, f"{self.stage.name} hangs: {output[-3000:]}"
                group.wait_for_orphans()
                assert group.is_torchrun or "Traceback" not in output, output
                if status == 0 or self.stage.finished_message in output:
                    self._record_recovery(is_finished=True)
                    return
                assert self.kills > kills_before, f"{self.stage.name} failed, status {status}: {output[-3000:]}"
                self.ended = self.ended or (ended, self.stage.progress(self.folder))
        raise AssertionError(f"{self.stage.name} does not finish: {output[-3000:]}")

    def _wait(self, group: ProcessGroup, deadline: float, condition: Callable[[], bool]) -> bool:
        """Wait for a condition until the deadline or the end of the command; return whether it became true."""
        while group.is_running() and time.monotonic() < deadline:
            if condition():
                return True
            self._record_recovery()
            time.sleep(0.005)
        return False

    def _wait_for_moment(self, group: ProcessGroup) -> bool:
        """Wait for the next time to kill; return False if the command ends first."""
        if self.chance.random() < 0.3:  # any time
            self._wait(group, time.monotonic() + self.chance.random() * 0.9 * self.seconds, lambda: False)
        else:
            phase, progress = self.chance.choice(self.stage.target_phases), self.stage.progress(self.folder)
            # At another step each time.
            goal = progress + (self.chance.randrange(1, STEPS // 6) if self.stage.name == "train" else 0)

            def is_in_phase() -> bool:
                is_far_enough = phase != "steps" or self.stage.progress(self.folder) >= goal
                return phase in self.stage.phase(self.folder) and is_far_enough

            self._wait(group, time.monotonic() + self.seconds, is_in_phase)
            self._wait(group, time.monotonic() + self.chance.random() ** 3, lambda: False)
        return group.is_running()

    def _kill_one(self, group: ProcessGroup) -> None:
        members = group.members()
        if not members:
            return
        process = self.chance.choice(sorted(members))
        number = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        phase = self.stage.phase(self.folder) or "starting"
        if send_signal(process, number):
            self.kills, self.phase = self.kills + 1, phase
            self.statistics.kills[self.stage.name, phase, members[process], number.name] += 1

    def _record_recovery(self, is_finished: bool = False) -> None:
        if self.ended and (is_finished or self.stage.progress(self.folder) > self.ended[1]):
            self.statistics.recoveries.append((time.monotonic() - self.ended[0], self.stage.name, self.phase))
            self.ended = None


def summarize(statistics: Statistics, seconds: float) -> list[str]:
    """Return the lines that are printed at the end, which docs/faults.md quotes."""
    total = sum(statistics.kills.values())
    by_stage, by_signal, by_process = Counter[str](), Counter[str](), Counter[str]()
    by_phase: Counter[tuple[str, str]] = Counter()
    for (stage, phase, process, name), number in statistics.kills.items():
        by_stage[stage] += number
        by_phase[stage, phase] += number
        by_process[process] += number
        by_signal[name] += number
    rounds = f"{len(statistics.rounds)} rounds in {seconds / 60:.1f} minutes"
    lines = [f"{rounds}, {total} kills: {_format_counts(by_signal)}"]
    for stage, starts in statistics.starts.items():
        phases = _format_counts(Counter({phase: n for (own, phase), n in by_phase.items() if own == stage}))
        lines.append(f"{stage}: {by_stage[stage]} kills ({phases}), started {starts} times")
    lines.append(f"killed: {_format_counts(by_process)}")
    if statistics.recoveries:
        longest = max(statistics.recoveries)
        lines.append(f"longest recovery: {longest[0]:.1f} s, {longest[1]}, killed in: {longest[2]}")
    return [*lines, *statistics.rounds]


def _format_counts(counts: "Counter[str]") -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "none"


def soak(folder: Path, minutes: float, seed: int) -> list[str]:
    """Run rounds until the time is over, at least one; return the summary. Raises AssertionError for a loss."""
    raw, statistics, start = folder / "raw", Statistics(), time.monotonic()
    write_raw_text(raw)
    references: dict[int, tuple[Path, dict[str, float]]] = {}
    number = 0
    while number == 0 or time.monotonic() - start < 60 * minutes:
        ranks, chance = 1 + number % 2, random.Random(f"{seed} {number}")
        if ranks not in references:
            reference = folder / f"reference-{ranks}"
            references[ranks] = reference, run_reference_round(reference, raw, ranks)
        reference, seconds = references[ranks]
        own = folder / f"round-{number}"
        write_round_folder(own, raw)
        for stage in build_stages(ranks):
            KillingRunner(own, stage, seconds[stage.name], chance, statistics).run()
            kills = sum(statistics.kills.values())
            print(f"round {number}, {ranks} ranks: {stage.name} done, {kills} kills", flush=True)
        result = assert_same_results(own, reference, RUN, STEPS, MILESTONES)
        statistics.rounds.append(f"round {number}, {ranks} ranks: {result}")
        shutil.rmtree(own)
        number += 1
    return summarize(statistics, time.monotonic() - start)


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
