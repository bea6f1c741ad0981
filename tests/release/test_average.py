"""The average of a run's last checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.conftest import flip_a_bit

from tinyllama.errors import InputError
from tinyllama.loading import load_model
from tinyllama.recipe import Recipe
from tinyllama.release.release import averaged_checkpoints, load_average
from tinyllama.runs.run_dir import CheckpointDir, RunDir

STEPS = (9, 10, 40)


def checkpoints_of(run: Path) -> list[CheckpointDir]:
    return [RunDir(run).checkpoint(step) for step in STEPS]


def average(checkpoints: list[CheckpointDir], decay: float) -> dict[str, torch.Tensor]:
    model = load_model(checkpoints[0].path)
    load_average(model, checkpoints, decay)
    return model.state_dict()


def read_with_dcp(checkpoint: CheckpointDir) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights in float64."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_model(checkpoint.path).state_dict().items()}
    dcp.load({"model": weights}, checkpoint_id=checkpoint.path, no_dist=True)
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("count", [2, 3])
def test_average_is_the_weighted_mean_of_the_stored_weights(run_template: Path, count: int, decay: float) -> None:
    checkpoints = checkpoints_of(run_template)[-count:]
    weights = [decay**age for age in reversed(range(count))]
    stored = [read_with_dcp(checkpoint) for checkpoint in checkpoints]
    for name, found in average(checkpoints, decay).items():
        mean = sum(w * state[name] for w, state in zip(weights, stored, strict=True)) / sum(weights)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), mean, rtol=0, atol=3e-7)
        assert (mean - stored[-1][name]).abs().max() > 1e-3  # otherwise the comparison would show little


def test_average_of_one_checkpoint_is_bit_identical(run_template: Path) -> None:
    newest = checkpoints_of(run_template)[-1]
    expected = load_model(newest.path).state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in average([newest], 0.8).items())


def set_checkpoint_interval(run: Path, steps: int) -> None:
    recipe = Recipe.load(run / "recipe.yaml", {"checkpoint.every_steps": steps})
    (run / "recipe.yaml").write_text(recipe.to_yaml())


def test_averaged_checkpoints_are_the_newest_up_to_the_released_one(run: Path) -> None:
    set_checkpoint_interval(run, 30)
    step_9, step_10, step_40 = checkpoints_of(run)
    assert averaged_checkpoints(step_40, 1) == [step_40]
    assert averaged_checkpoints(step_40, 2) == [step_10, step_40]
    assert averaged_checkpoints(step_40, 3) == [step_9, step_10, step_40]
    assert averaged_checkpoints(step_10, 2) == [step_9, step_10]


@pytest.mark.parametrize(
    ("interval", "step", "count", "available"),
    [(30, 10, 3, "2 .*step 9, 10"), (1, 40, 2, "1 .*step 40")],
    ids=["too few", "gap"],
)
def test_too_few_checkpoints_in_a_row_are_an_error(
    run: Path, interval: int, step: int, count: int, available: str
) -> None:
    set_checkpoint_interval(run, interval)
    with pytest.raises(InputError, match=rf"^{run}: --average is {count}, .*{available}"):
        averaged_checkpoints(RunDir(run).checkpoint(step), count)


@pytest.mark.parametrize("step", STEPS)
def test_damaged_checkpoint_is_not_averaged(run: Path, step: int) -> None:
    checkpoints = checkpoints_of(run)
    model = load_model(checkpoints[STEPS.index(step) - 1].path)
    flip_a_bit(next(RunDir(run).checkpoint(step).path.glob("*.distcp")))
    with pytest.raises(InputError, match=rf"step-000000{step:02d}/.*distcp .*hash"):
        load_average(model, checkpoints, 1.0)


def test_checkpoints_of_two_runs_are_an_error(run: Path, run_template: Path) -> None:
    checkpoints = [checkpoints_of(run)[0], checkpoints_of(run_template)[1]]
    with pytest.raises(InputError, match="same run"):
        load_average(load_model(checkpoints[0].path), checkpoints, 1.0)
