"""Releases at a run's milestones: made and scored by sidecar processes, whatever happens to these."""

import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.fork_server import SidecarProcess
from tests.train.launch import event_steps, read_events, read_metrics, start_training
from tests.train.torchrun import write_recipe

from tinyllama import processes
from tinyllama.errors import RunStoppedError
from tinyllama.files import read_json
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir
from tinyllama.train import milestones
from tinyllama.train.loop import train

pytest_plugins = ["tests.train.fixtures"]
pytestmark = pytest.mark.slow

BATCH = 6 * 64
FIELDS: dict[str, object] = {
    "train.tokens": 20 * BATCH,
    "release.at_tokens": [5 * BATCH, 20 * BATCH - 1],
    "release.tasks": [],
}
ONE_MILESTONE: dict[str, object] = {"release.at_tokens": [5 * BATCH]}


@pytest.fixture(autouse=True)
def forked_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the release processes of runs in this process; `start_training` starts them normally."""
    fast = SimpleNamespace(Popen=SidecarProcess, PIPE=subprocess.PIPE)
    monkeypatch.setattr(processes, "subprocess", fast)


def releases_of(run: Path) -> list[tuple[int, bool]]:
    """Return the step of each release, and whether it has all scores that the recipe asks for."""
    return [(row["step"], row["complete"]) for row in RunDir(run).releases.table()["releases"]]


def assert_trained(run: Path) -> None:
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 21))


def recipe_in(folder: Path, small: Path, /, **fields: object) -> Recipe:
    return Recipe.load(folder / write_recipe(folder, small, "milestones", **FIELDS | fields))


def test_each_milestone_is_released_and_scored_together_with_the_baselines(small: Path, work_dir: Path) -> None:
    baseline = work_dir / "runs/milestones/releases/step-00000005/huggingface"  # exists when it is to be scored
    scored = {"release.tasks": ["piqa", "hellaswag"], "release.limit": 4, "release.baselines": [str(baseline)]}
    run = train(recipe_in(work_dir, small, **scored))
    assert releases_of(run) == [(5, True), (20, True)]
    assert event_steps(run, "release") == [5, 20]
    assert_trained(run)
    table = read_json(run / "releases/releases.json")
    assert all(row["coverage"] == "first 4 of 10042 items" for row in table["releases"])
    assert table["baselines"][0]["source"] == "measured"
    assert table["baselines"][0]["hellaswag"] == table["releases"][0]["hellaswag"]  # the same weights
    for step in (5, 20):
        card = (run / f"releases/step-{step:08d}/huggingface/README.md").read_text()
        assert all(text in card for text in ("milestones, step 5", "milestones, step 20", str(baseline)))


def test_failed_release_is_retried_while_training_continues(
    small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milestones, "_RETRY_SECONDS", 0.0)
    run, recipe = work_dir / "runs/milestones", recipe_in(work_dir, small, **ONE_MILESTONE)
    obstacle = run / "releases"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()  # a file in place of the releases' folder
    with pytest.raises(RunStoppedError, match="release of step 5"):
        train(recipe)
    failures = read_events(run, "release-failed")
    assert [row["tries"] for row in failures] == [1, 2, 3]
    assert "runs/milestones/releases: File exists" in failures[0]["problem"]
    assert_trained(run)
    obstacle.unlink()
    train(recipe)  # a trained run resumes its releases
    assert releases_of(run) == [(5, True)]
    assert RunDir(run).pending_milestones() == []


def test_release_with_wrong_input_is_not_retried_before_the_next_start(
    small: Path, work_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, recipe = work_dir / "runs/milestones", recipe_in(work_dir, small, **ONE_MILESTONE)
    obstacle = run / "releases/step-00000005"
    obstacle.mkdir(parents=True)
    with pytest.raises(RunStoppedError, match="release of step 5"):
        train(recipe)
    (failure,) = read_events(run, "release-failed")
    assert "step-00000005" in failure["problem"]
    assert "retried when the run is started again" in capfd.readouterr().err
    assert_trained(run)
    assert RunDir(run).pending_milestones() == [5]
    obstacle.rmdir()
    train(recipe)
    assert releases_of(run) == [(5, True)]


def test_run_killed_during_a_release_makes_it_when_it_resumes(small: Path, work_dir: Path) -> None:
    recipe = Recipe.load(small / "recipe.yaml", FIELDS)
    (work_dir / "recipe.yaml").write_text(recipe.to_yaml())
    with start_training(work_dir, work_dir) as training:
        training.wait_until((training.run / "releases").is_dir, "a release")
        training.process.kill()
        training.end()
    assert 20 not in dict(releases_of(training.run))
    train(recipe)
    assert releases_of(training.run) == [(5, True), (20, True)]
    assert_trained(training.run)


def test_sigterm_during_the_last_release_exits_with_the_requeue_status(small: Path, work_dir: Path) -> None:
    recipe = Recipe.load(small / "recipe.yaml", FIELDS)
    (work_dir / "recipe.yaml").write_text(recipe.to_yaml())
    with start_training(work_dir, work_dir) as training:
        training.wait_until(lambda: "releasing step" in training.output(), "the last release")
        training.send_signal(signal.SIGTERM)
        assert training.end() == 75, training.output()
        (line,) = training.error_lines()
        assert "SIGTERM" in line and "resume" in line
    train(recipe)
    assert releases_of(training.run) == [(5, True), (20, True)]


def test_run_started_again_from_step_0_releases_its_own_weights(small: Path, work_dir: Path) -> None:
    run = train(recipe_in(work_dir, small, **ONE_MILESTONE))
    weights = run / "releases/step-00000005/huggingface/model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(run / "checkpoints")
    train(recipe_in(work_dir, small, **ONE_MILESTONE, seed=99))
    assert weights.read_bytes() != before
    assert releases_of(run) == [(5, True)]


def test_release_averages_the_checkpoints_up_to_its_own(small: Path, work_dir: Path) -> None:
    fields = {"checkpoint.every_steps": 5, "checkpoint.keep": 2, "release.average_checkpoints": 2}
    run = train(recipe_in(work_dir, small, **fields, **{"release.at_tokens": [10 * BATCH]}))
    metadata = read_json(run / "releases/step-00000010/release.json")
    assert list(metadata["checkpoints"]) == ["step-00000005", "step-00000010"]
