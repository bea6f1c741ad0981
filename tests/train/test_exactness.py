"""Exact resumption: however and whenever a run is killed, it ends with the weights of a run without faults."""

import os
import random
import re
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.train.fault_injection import Fault
from tests.train.launch import (
    TrainingProcess,
    assert_same_run,
    event_steps,
    fault_in_batch,
    has_metrics,
    read_events,
    read_metrics,
    start_training,
    train_to_end,
)
from tests.train.single_process import load_recipe

from tinyllama.evaluate.evaluation import evaluate
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.runs.run_dir import RunDir
from tinyllama.runs.samples import current_samples
from tinyllama.train.loop import train
from tinyllama.train.samples import complete_prompts

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow

PROMPTS = ["import os", "def main("]
EVALUATIONS = ["--train.evaluate_every_steps", "15", "--train.evaluate_limit", "4"]
EVALUATIONS += ["--train.evaluate_tasks", "['winogrande', 'arc_easy']"]
SAMPLES = ["--train.sample_prompts", "['import os', 'def main(']", "--train.validate_every_steps", "12"]


def kill_one_rank(training: TrainingProcess) -> None:
    os.kill(training.workers().get(1, training.pid), signal.SIGKILL)


def kill_all_ranks(training: TrainingProcess) -> None:
    for worker in training.workers().values():
        os.kill(worker, signal.SIGKILL)


def kill_the_launcher(training: TrainingProcess) -> None:
    training.process.kill()


def wait_for_orphans(training: TrainingProcess) -> None:
    """Wait until no rank is left."""
    deadline = time.monotonic() + 30
    while left := training.workers():
        assert time.monotonic() < deadline, f"ranks {sorted(left)} survived their launcher"
        time.sleep(0.01)


def assert_samples_logged_once(run: Path, steps: list[int], is_start_repeated: bool = False) -> None:
    """Assert that the log has one sample per prompt and step, and that those of the last step are of the weights."""
    samples = current_samples(RunDir(run).events())
    assert [(event["step"], event["prompt"]) for event in samples] == [
        (step, text) for step in steps for text in PROMPTS
    ]
    assert is_start_repeated or len(read_events(run, "sample")) == len(samples)
    expected = complete_prompts(load_model(run), load_tokenizer(run), PROMPTS)
    assert [{name: event[name] for name in expected[0]} for event in samples[-2:]] == expected


def assert_evaluations_are_those_of_the_checkpoints(run: Path) -> None:
    """Assert that each step was evaluated once, with the scores of `evaluate`, which metrics.jsonl also has."""
    rows = list(RunDir(run).evaluations())
    assert [row["step"] for row in rows] == [15, 30, 40]
    for row in rows[-2:]:  # steps with a checkpoint
        checkpoint = RunDir(run).checkpoint(row["step"]).path
        expected = evaluate(checkpoint, ("winogrande", "arc_easy"), limit=4, precision=torch.bfloat16)
        same = ("rows", "tokens", "limit", "precision", "coverage", "data", "num_fewshot", "versions", "shortened")
        assert {name: row[name] for name in same} == {name: asdict(expected)[name] for name in same}
        metrics = read_metrics(run)[row["step"] - 1]
        for name in ("acc", "acc_norm_stderr", "bits_per_byte", "items"):
            assert metrics[f"evaluation/arc_easy/{name}"] == expected.rows["arc_easy"][name]


def test_evaluations_on_two_ranks_change_no_weights(small: Path, tmp_path: Path, reference_run_2_ranks: Path) -> None:
    run = train_to_end(small, tmp_path, *EVALUATIONS, ranks=2)
    assert_same_run(run, reference_run_2_ranks)
    assert_evaluations_are_those_of_the_checkpoints(run)


@pytest.mark.long
def test_resume_after_kills_of_ranks_or_launcher_is_bit_identical(
    small: Path, tmp_path: Path, reference_run_2_ranks: Path
) -> None:
    """The samples, which only the killed run has, do not change the weights."""
    chance = random.Random(11)
    slow: Fault = {"do": "slow", "seconds": 0.01}  # so that the kills happen during work
    for number, kill in enumerate((kill_one_rank, kill_all_ranks, kill_the_launcher)):
        with start_training(small, tmp_path, *SAMPLES, ranks=2, faults=[slow]) as training:
            # After some progress, within about the time of a checkpoint.
            goal = number * 10 + chance.randrange(1, 10)
            training.wait_until(partial(has_metrics, training.run, goal), f"step {goal}")
            time.sleep(chance.random() * 0.3)
            kill(training)
            training.end()
            wait_for_orphans(training)
    run = train_to_end(small, tmp_path, *SAMPLES, ranks=2)
    assert_same_run(run, reference_run_2_ranks)
    assert_samples_logged_once(run, [12, 24, 36, 40], is_start_repeated=True)


def test_no_rank_survives_its_launcher(small: Path, tmp_path: Path) -> None:
    """A surviving rank would train alongside the run's next processes, or prevent their start."""
    wait = fault_in_batch(load_recipe(small), "wait", 13, 1)
    with start_training(small, tmp_path, ranks=2, faults=[wait]) as training:
        training.wait_until_injected(wait)
        assert sorted(training.workers()) == [0, 1]
        training.process.kill()
        training.end()
        wait_for_orphans(training)
    assert read_metrics(training.run)[-1]["step"] == 13


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json", "commit.json"])
def test_incomplete_checkpoint_is_never_resumed_from(
    small: Path, work_dir: Path, reference_run: Path, file: str
) -> None:
    kill: Fault = {"do": "kill", "file": f"checkpoints/step-00000020/{file}"}
    with start_training(small, work_dir, faults=[kill]) as training:
        assert training.end() == -signal.SIGKILL, training.output()
    incomplete = training.run / "checkpoints/step-00000020"
    assert any(path.name.startswith(file) for path in incomplete.iterdir())
    assert not (incomplete / "commit.json").exists()
    train(load_recipe(small))
    assert event_steps(training.run, "start", "resume") == [0, 10]
    assert_same_run(training.run, reference_run)


def test_resume_after_a_kill_within_a_row_logs_each_step_once(small: Path, work_dir: Path, reference_run: Path) -> None:
    """The samples and evaluations, which only the killed run has, do not change the weights."""
    kill: Fault = {"do": "tear", "step": 16}
    with start_training(small, work_dir, *SAMPLES, *EVALUATIONS, faults=[kill]) as training:
        assert training.end() == -signal.SIGKILL, training.output()
        assert 'step 12: "import os" → "' in training.output()
        assert re.search(r"step 15: winogrande acc [\d.]+ ± [\d.]+, first 4 of 1267 items\n", training.output())
    assert not (training.run / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert read_metrics(training.run)[-1]["step"] == 15
    train_to_end(small, work_dir, *SAMPLES, *EVALUATIONS)
    assert [row["step"] for row in read_metrics(training.run)] == list(range(1, 41))
    assert_same_run(training.run, reference_run)
    assert_evaluations_are_those_of_the_checkpoints(training.run)
    assert_samples_logged_once(training.run, [12, 24, 36, 40])
