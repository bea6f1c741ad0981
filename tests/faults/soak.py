"""Tokenizer, prepare, train, release, in a loop, with random processes killed at random moments: `make soak`.

Each round runs all stages in its own folder, then `soak_checks` compares it with a round to which nothing happened.
What is killed, when and how follows from the seed; what it then hits depends on the machine as well.
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
_MOST_KILLS = 12
"""Of a stage in a round; after them it is left alone, so that every round ends."""


@dataclass(frozen=True)
class Stage:
    """A command, how far it is, and how to see what it is doing."""

    name: str
    command: Callable[[random.Random], list[str]]
    progress: Callable[[Path], int]
    phase: Callable[[Path], str]
    """In a folder; empty before anything was written."""
    phases: tuple[str, ...]
    """Some to lie in wait for."""
    done_already: str = "\0"
    """What it says, with a status of its own, where it was killed after its last byte."""


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """By stage, phase, process and signal."""
    starts: Counter[str] = field(default_factory=Counter)
    rounds: list[str] = field(default_factory=list)
    recoveries: list[tuple[float, str, str]] = field(default_factory=list)
    """Seconds from an end by a kill until the stage was further than then, stage, and phase that was hit."""


def count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def tokenizer_phase(folder: Path) -> str:
    return "writing" if (folder / "tokenizer").exists() else ""


def prepare_phase(folder: Path) -> str:
    if not (folder / "store/.work").exists():
        return ""
    return "tasks" if count(folder, "store/.work/receipts/tokens/*.json") < TASKS else "finishing"


def train_phase(folder: Path) -> str:
    """What training and what is beside it are doing, as far as their files tell."""
    run = folder / RUN
    saving = any(not (path / "commit.json").exists() for path in run.glob("checkpoints/step-*"))
    doing = [word for word, is_so in (("saving", saving), ("releasing", count(run, "releases/.*.part"))) if is_so]
    done = lines(run / "metrics.jsonl")
    if not doing and not done:
        return ""
    return ", ".join(doing) or ("after the last step" if done >= STEPS else "steps")


def release_phase(folder: Path) -> str:
    return "writing" if count(folder, f"{RUN}/releases/.*.part") else "before or after"


def tinyllama(*words: str) -> list[str]:
    return [sys.executable, "-m", "tinyllama", *words]


def stages(ranks: int) -> list[Stage]:
    """The way through, training on so many ranks."""

    def train(chance: random.Random) -> list[str]:
        again = f"--max-restarts={chance.choice((0, 2))}"
        launcher = [*TORCHRUN, f"--nproc_per_node={ranks}", again] if ranks > 1 else [sys.executable]
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
            lambda folder: count(folder, "store/.work/receipts/tokens/*.json"),
            prepare_phase,
            ("tasks", "finishing"),
        ),
        Stage(
            "train",
            train,
            lambda folder: lines(folder / RUN / "metrics.jsonl") + count(folder, f"{RUN}/releases/step-*/release.json"),
            train_phase,
            ("saving", "releasing", "steps", "after the last step"),
        ),
        Stage("release", lambda _: release, lambda folder: 0, release_phase, ("writing",)),
    ]


TASKS = 12
"""Of prepare: one a file."""


def lay_out(folder: Path) -> None:
    """Raw text, shared by all rounds, whose files are a task each."""
    texts = python_sources(150)
    for number in range(TASKS - 1):
        write_jsonl(folder / f"modules/{number:02d}.jsonl", texts[number * 12 :] + texts)
    write_jsonl(folder / "lines/a.jsonl", [line for text in texts[:40] for line in text.splitlines() if line.strip()])


def begin(folder: Path, raw: Path) -> None:
    """A round's folder; its recipe's paths are relative, so that nothing written tells one round from another."""
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


def undisturbed(folder: Path, raw: Path, ranks: int) -> dict[str, float]:
    """A round to which nothing happens; how long each stage takes."""
    begin(folder, raw)
    took = {}
    for stage in stages(ranks):
        begun = time.monotonic()
        with start_group(stage.command(random.Random(0)), folder) as group:
            assert group.process.wait(LIMIT_SECONDS) == 0, group.said.read_text()
        took[stage.name] = time.monotonic() - begun
    return took


class Disturber:
    """Goes through a stage, life after life, killing."""

    def __init__(self, folder: Path, stage: Stage, seconds: float, chance: random.Random, tally: Tally) -> None:
        self.folder, self.stage, self.seconds, self.chance, self.tally = folder, stage, seconds, chance, tally
        self.ended: tuple[float, int] | None = None
        """When a kill ended the command, and how far it was, until that is made good."""
        self.phase, self.kills = "", 0

    def run(self) -> None:
        """Start the command until it ends well."""
        for _ in range(5 * _MOST_KILLS):
            self.tally.starts[self.stage.name] += 1
            before = self.kills
            with start_group(self.stage.command(self.chance), self.folder) as group:
                while group.is_running() and self.kills < _MOST_KILLS and self._wait_for_moment(group):
                    self._strike(group)
                self._wait(group, time.monotonic() + LIMIT_SECONDS, lambda: False)
                ended = time.monotonic()
                said, status = group.said.read_text(), group.process.poll()
                assert status is not None, f"{self.stage.name} hangs: {said[-3000:]}"
                group.wait_for_orphans()
                assert group.is_torchruns or "Traceback" not in said, said
                if status == 0 or self.stage.done_already in said:
                    self._note_recovery(finished=True)
                    return
                assert self.kills > before, f"{self.stage.name} failed by itself, status {status}: {said[-3000:]}"
                self.ended = self.ended or (ended, self.stage.progress(self.folder))
        raise AssertionError(f"{self.stage.name} does not come to its end: {said[-3000:]}")

    def _wait(self, group: ProcessGroup, deadline: float, condition: Callable[[], bool]) -> bool:
        """Wait for a condition, until the deadline or the command's end; note what has been made good meanwhile."""
        while group.is_running() and time.monotonic() < deadline:
            if condition():
                return True
            self._note_recovery()
            time.sleep(0.005)
        return False

    def _wait_for_moment(self, group: ProcessGroup) -> bool:
        """Wait for the next moment to kill; False where the command ends before."""
        if self.chance.random() < 0.3:  # any moment
            self._wait(group, time.monotonic() + self.chance.random() * 0.9 * self.seconds, lambda: False)
        else:
            phase, now = self.chance.choice(self.stage.phases), self.stage.progress(self.folder)
            # At a new place, so that not every kill finds the same.
            further = now + (self.chance.randrange(1, STEPS // 6) if self.stage.name == "train" else 0)
            self._wait(
                group,
                time.monotonic() + self.seconds,
                lambda: (
                    phase in self.stage.phase(self.folder)
                    and (phase != "steps" or self.stage.progress(self.folder) >= further)
                ),
            )
            self._wait(group, time.monotonic() + self.chance.random() ** 3, lambda: False)
        return group.is_running()

    def _strike(self, group: ProcessGroup) -> None:
        members = group.members()
        if not members:
            return
        number = self.chance.choice(sorted(members))
        what = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        phase = self.stage.phase(self.folder) or "starting"
        if send_signal(number, what):
            self.kills, self.phase = self.kills + 1, phase
            self.tally.kills[self.stage.name, phase, members[number], what.name] += 1

    def _note_recovery(self, finished: bool = False) -> None:
        if self.ended and (finished or self.stage.progress(self.folder) > self.ended[1]):
            self.tally.recoveries.append((time.monotonic() - self.ended[0], self.stage.name, self.phase))
            self.ended = None


def summary(tally: Tally, seconds: float) -> list[str]:
    """What is printed at the end, and what docs/faults.md quotes."""
    total = sum(tally.kills.values())
    by_stage, by_signal, by_process = Counter[str](), Counter[str](), Counter[str]()
    by_phase: Counter[tuple[str, str]] = Counter()
    for (stage, phase, process, name), number in tally.kills.items():
        by_stage[stage] += number
        by_phase[stage, phase] += number
        by_process[process] += number
        by_signal[name] += number
    found = [f"{len(tally.rounds)} rounds in {seconds / 60:.1f} minutes, {total} kills: {_spelt(by_signal)}"]
    for stage, starts in tally.starts.items():
        phases = _spelt(Counter({phase: n for (own, phase), n in by_phase.items() if own == stage}))
        found.append(f"{stage}: {by_stage[stage]} kills ({phases}), started {starts} times")
    found.append(f"killed: {_spelt(by_process)}")
    if tally.recoveries:
        longest = max(tally.recoveries)
        found.append(f"longest recovery: {longest[0]:.1f} s, {longest[1]}, killed in: {longest[2]}")
    return [*found, *tally.rounds]


def _spelt(counts: "Counter[str]") -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "none"


def soak(folder: Path, minutes: float, seed: int) -> list[str]:
    """Rounds until the time is up, one at least, each proved; the summary. AssertionError where something was lost."""
    raw, tally, begun = folder / "raw", Tally(), time.monotonic()
    lay_out(raw)
    calm: dict[int, tuple[Path, dict[str, float]]] = {}
    number = 0
    while number == 0 or time.monotonic() - begun < 60 * minutes:
        ranks, chance = 1 + number % 2, random.Random(f"{seed} {number}")
        if ranks not in calm:
            calm[ranks] = folder / f"calm-{ranks}", undisturbed(folder / f"calm-{ranks}", raw, ranks)
        wanted, took = calm[ranks]
        own = folder / f"round-{number}"
        begin(own, raw)
        for stage in stages(ranks):
            Disturber(own, stage, took[stage.name], chance, tally).run()
            print(f"round {number}, {ranks} ranks: {stage.name} done, {sum(tally.kills.values())} kills", flush=True)
        proved = assert_same_results(own, wanted, RUN, STEPS, MILESTONES)
        tally.rounds.append(f"round {number}, {ranks} ranks: {proved}")
        shutil.rmtree(own)
        number += 1
    return summary(tally, time.monotonic() - begun)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the seed first and what happened last; what is wrong is an AssertionError, and its round is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20))
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"soak --minutes {given.minutes:g} --seed {given.seed}, in {folder}", flush=True)
    print("\n".join(soak(folder, given.minutes, given.seed)), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
