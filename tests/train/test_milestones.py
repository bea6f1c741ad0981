"""At its milestones a run releases and scores by itself, in processes beside training, whatever happens to them."""

import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine_server import Program
from tests.train.launch import start_training
from tests.train.torchrun import write_recipe

from tinyllama.errors import RunStoppedError
from tinyllama.files import read_json, sha256_of
from tinyllama.recipe import Recipe
from tinyllama.runs import sidecar
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


@pytest.fixture(autouse=True)
def quick_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the releases of runs in this process; what `start_training` starts starts them as the package does."""
    quick = SimpleNamespace(Popen=Program, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(sidecar, "subprocess", quick)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in RunDir(run).events() if row["event"] == name]


def released(run: Path) -> list[tuple[int, bool]]:
    """Step of each release, and whether all is done that the recipe asks for."""
    path = run / "releases" / "releases.json"
    return [(row["step"], row["complete"]) for row in read_json(path)["releases"]] if path.is_file() else []


def recipe_in(folder: Path, small: Path, /, **fields: object) -> Recipe:
    return Recipe.load(folder / write_recipe(folder, small, "milestones", **FIELDS | fields))


def test_each_milestone_is_released_and_scored_beside_the_baselines(small: Path, work_dir: Path) -> None:
    baseline = work_dir / "runs/milestones/releases/step-00000005/huggingface"  # which is there when it is to be scored
    scored = {"release.tasks": ["piqa", "hellaswag"], "release.limit": 4, "release.baselines": [str(baseline)]}
    run = train(recipe_in(work_dir, small, **scored))
    assert released(run) == [(5, True), (20, True)]
    assert [row["step"] for row in events(run, "release")] == [5, 20]
    assert len(list(RunDir(run).metrics())) == 20
    table = read_json(run / "releases/releases.json")
    assert all(row["coverage"] == "first 4 of 10042 items" for row in table["releases"])
    assert table["baselines"][0]["source"] == "measured"
    assert table["baselines"][0]["hellaswag"] == table["releases"][0]["hellaswag"]  # the same weights
    for step in (5, 20):
        card = (run / f"releases/step-{step:08d}/huggingface/README.md").read_text()
        assert "milestones, step 5" in card and "milestones, step 20" in card and str(baseline) in card


def test_a_release_that_fails_is_tried_again_and_training_goes_on(
    small: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milestones, "_RETRY_SECONDS", 0.0)
    run, recipe = (
        work_dir / "runs/milestones",
        recipe_in(work_dir, small, **{"release.at_tokens": [5 * BATCH]}),
    )
    planted = run / "releases"
    planted.parent.mkdir(parents=True)
    planted.touch()  # where the releases' folder belongs
    with pytest.raises(RunStoppedError, match="the release of step 5 failed"):
        train(recipe)
    failed = events(run, "release-failed")
    assert [row["tries"] for row in failed] == [1, 2, 3]
    assert "runs/milestones/releases: File exists" in failed[0]["problem"]
    assert [row["step"] for row in RunDir(run).metrics()] == list(range(1, 21))
    planted.unlink()
    train(recipe)  # a run that is trained goes on with its releases
    assert released(run) == [(5, True)]
    assert RunDir(run).pending_milestones() == []


def test_a_release_that_fails_for_its_input_is_not_tried_again_before_the_run_is_started_again(
    small: Path, work_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, recipe = (
        work_dir / "runs/milestones",
        recipe_in(work_dir, small, **{"release.at_tokens": [5 * BATCH]}),
    )
    planted = run / "releases/step-00000005"
    planted.mkdir(parents=True)  # in the release's way
    with pytest.raises(RunStoppedError, match="the release of step 5 failed"):
        train(recipe)
    (failed,) = events(run, "release-failed")
    assert "in the way" in failed["problem"]
    assert "it is retried when" in capfd.readouterr().err
    assert [row["step"] for row in RunDir(run).metrics()] == list(range(1, 21))
    assert RunDir(run).pending_milestones() == [5]
    planted.rmdir()
    train(recipe)
    assert released(run) == [(5, True)]


def test_a_run_killed_while_it_releases_finishes_that_when_it_goes_on(small: Path, work_dir: Path) -> None:
    recipe = Recipe.load(small / "recipe.yaml", FIELDS)
    (work_dir / "recipe.yaml").write_text(recipe.to_yaml())
    with start_training(work_dir, work_dir) as life:
        life.wait_until((life.run / "releases").is_dir, "a release")
        life.process.kill()
        life.end()
    assert 20 not in dict(released(life.run))
    train(recipe)
    assert released(life.run) == [(5, True), (20, True)]
    assert [row["step"] for row in RunDir(life.run).metrics()] == list(range(1, 21))


def test_sigterm_while_the_last_release_is_made_ends_with_the_status_that_asks_to_be_started_again(
    small: Path, work_dir: Path
) -> None:
    recipe = Recipe.load(small / "recipe.yaml", FIELDS)
    (work_dir / "recipe.yaml").write_text(recipe.to_yaml())
    with start_training(work_dir, work_dir) as life:
        life.wait_until(lambda: "releasing step" in life.output(), "the last release")
        life.process.send_signal(signal.SIGTERM)
        assert life.end() == 75, life.output()
        assert life.error_lines() == ["tinyllama: SIGTERM: stopped; rerun the same command to resume"]
    train(recipe)
    assert released(life.run) == [(5, True), (20, True)]


def test_a_run_that_begins_anew_releases_its_own_weights(small: Path, work_dir: Path) -> None:
    fields = {"release.at_tokens": [5 * BATCH]}
    run = train(recipe_in(work_dir, small, **fields))
    weights = run / "releases/step-00000005/huggingface/model.safetensors"
    before = sha256_of(weights)
    shutil.rmtree(run / "checkpoints")
    train(recipe_in(work_dir, small, **fields, seed=99))
    assert sha256_of(weights) != before
    assert released(run) == [(5, True)]


def test_what_a_release_will_average_is_kept_until_it_is_made(small: Path, work_dir: Path) -> None:
    fields = {"checkpoint.every_steps": 5, "checkpoint.keep": 2, "release.average_checkpoints": 2}
    run = train(recipe_in(work_dir, small, **fields | {"release.at_tokens": [10 * BATCH]}))
    facts = read_json(run / "releases/step-00000010/release.json")
    assert list(facts["checkpoints"]) == ["step-00000005", "step-00000010"]
