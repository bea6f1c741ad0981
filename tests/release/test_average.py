"""A release may be the mean of a run's last checkpoints: exactly the weighted one, or it is refused in one line."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.conftest import flip_a_bit

from tinyllama.errors import InputError
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama
from tinyllama.recipe import Recipe
from tinyllama.release.average import average_into, averaged_checkpoints, averaging_weights
from tinyllama.runs.checkpoint import checkpoint_folder

STEPS = (9, 10, 40)


def folders_of(run: Path) -> list[Path]:
    return [checkpoint_folder(run, step) for step in STEPS]


def averaged(folders: list[Path], decay: float) -> dict[str, torch.Tensor]:
    model = load_model(folders[0])
    average_into(model, folders, decay)
    return model.state_dict()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights as DCP reads them, in float64."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_model(folder).state_dict().items()}
    dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    return {name: tensor.double() for name, tensor in weights.items()}


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_is_the_weighted_one_of_what_dcp_reads(run_template: Path, count: int, decay: float) -> None:
    folders = folders_of(run_template)[-count:]
    weights = [decay**age for age in reversed(range(count))]  # the newest counts whole
    everything = [stored(folder) for folder in folders]
    for name, found in averaged(folders, decay).items():
        mean = sum(w * state[name] for w, state in zip(weights, everything, strict=True)) / sum(weights)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), mean, rtol=0, atol=3e-7)
        assert (mean - everything[-1][name]).abs().max() > 1e-3  # or the comparison would say little


def test_one_checkpoint_alone_comes_back_bit_for_bit(run_template: Path) -> None:
    newest = folders_of(run_template)[-1]
    expected = load_model(newest).state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in averaged([newest], 0.8).items())


@pytest.mark.parametrize(
    ("count", "decay", "expected"), [(4, 1.0, [0.25] * 4), (3, 0.5, [1 / 7, 2 / 7, 4 / 7]), (1, 0.5, [1.0])]
)
def test_each_counts_decay_times_the_next_and_all_of_them_one(count: int, decay: float, expected: list[float]) -> None:
    assert averaging_weights(count, decay) == pytest.approx(expected)


def with_checkpoints_every(run: Path, steps: int) -> Path:
    recipe = Recipe.load(run / "recipe.yaml", {"checkpoint.every_steps": steps})
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    return run


def test_they_are_the_newest_ones_up_to_the_released_one(run: Path) -> None:
    nine, ten, forty = folders_of(with_checkpoints_every(run, 30))
    assert averaged_checkpoints(run, forty, 1) == [forty]
    assert averaged_checkpoints(run, forty, 2) == [ten, forty]
    assert averaged_checkpoints(run, forty, 3) == [nine, ten, forty]
    assert averaged_checkpoints(run, ten, 2) == [nine, ten]


def refused(run: Path, source: Path, count: int) -> str:
    with pytest.raises(InputError) as error:
        averaged_checkpoints(run, source, count)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_too_few_are_refused_with_their_number_and_the_remedy(run: Path) -> None:
    with_checkpoints_every(run, 30)
    said = refused(run, checkpoint_folder(run, 10), 3)
    assert said.startswith(f"{run}: --average is 3, but up to step-00000010 there are 2 checkpoints in a row")
    assert "(of step 9, 10); give at most 2" in said


def test_a_milestone_is_not_averaged_with_one_long_before_it(run: Path) -> None:
    assert "there are 1 checkpoints in a row (of step 40)" in refused(run, checkpoint_folder(run, 40), 2)


def test_one_that_was_never_committed_does_not_count(run: Path) -> None:
    with_checkpoints_every(run, 40)
    (checkpoint_folder(run, 10) / "commit.json").unlink()
    assert averaged_checkpoints(run, checkpoint_folder(run, 40), 2) == [folders_of(run)[0], folders_of(run)[2]]


@pytest.mark.parametrize("step", STEPS)
def test_a_damaged_one_is_refused_by_its_files_name(run: Path, step: int) -> None:
    folders = folders_of(run)
    model = load_model(folders[STEPS.index(step) - 1])
    flip_a_bit(next(checkpoint_folder(run, step).glob("*.distcp")))
    with pytest.raises(InputError, match=rf"step-000000{step:02d}/.*distcp does not match its hash"):
        average_into(model, folders, 1.0)


def test_those_of_two_runs_are_refused(run: Path, run_template: Path) -> None:
    model = load_model(folders_of(run)[0])
    with pytest.raises(InputError, match="of another run than"):
        average_into(model, [folders_of(run)[0], folders_of(run_template)[1]], 1.0)


def test_another_shape_is_refused_in_one_line(run: Path) -> None:
    folders = folders_of(run)
    shape = Recipe.load(run / "recipe.yaml").model.model_copy(update={"ffn_dim": 64})
    with pytest.raises(InputError, match=r"step-00000040: does not fit its run's recipe\.yaml \(.*ffn") as error:
        average_into(Llama(shape, load_model(folders[0]).vocab_size), folders, 1.0)
    assert "\n" not in str(error.value)
