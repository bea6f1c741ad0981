"""Training is exact: the peer's losses step by step, and the same weights however often it was killed."""

import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conftest import HOLD
from tests.train.launch import has_metrics, read_events, read_losses, read_metrics, same_weights, start_training
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.torchrun import metric_by_step, run_torchrun, write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.data.batches import batch_of_step
from tinyllama.errors import InputError
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.recipe import Recipe
from tinyllama.runs import checkpoint
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer.training import train_tokenizer
from tinyllama.train.loop import train
from tinyllama.train.schedule import learning_rate
from tinyllama.train.setup import TrainState

pytest_plugins = ["tests.train.fixtures"]


def step_of(trainer: TrainState, step: int) -> float:
    rows = batch_of_step(trainer.recipe, trainer.store, step)
    return float(train_step(trainer, step, rows)[0])


def test_the_loss_follows_transformers_and_its_adamw_step_by_step(small: Path) -> None:
    recipe = load_recipe(small)
    trainer = build_state(recipe)
    config = config_to_hugging_face(recipe.model, trainer.tokenizer.vocab_size, 1, 2) | {"dtype": "float32"}
    peer = LlamaForCausalLM(LlamaConfig(**config))
    peer.load_state_dict(dict(to_hugging_face(trainer.model.state_dict(), recipe.model)))
    matrices = [parameter for parameter in peer.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in peer.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(20):
        rows = batch_of_step(recipe, trainer.store, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.train.schedule, 3e-3, step, recipe.train.steps)
        expected = peer(input_ids=rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:].contiguous()).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss, _ = train_step(trainer, step, rows)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4), f"step {step}"
    assert float(loss) < 5.5  # it learns: the loss of a uniform guess over 600 pieces is 6.4


def test_the_micro_batch_changes_only_rounding(small: Path) -> None:
    losses = []
    for rows in (1, 2, 6):
        trainer = build_state(load_recipe(small, **{"train.micro_batch_sequences": rows}))
        losses.append([step_of(trainer, step) for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_bf16_compiled_follows_float32(small: Path) -> None:
    exact = build_state(load_recipe(small))
    fast = build_state(load_recipe(small, **{"train.precision": "bf16", "train.compile": True}))
    for step in range(5):
        assert step_of(fast, step) == pytest.approx(step_of(exact, step), rel=1e-2)
    assert {parameter.dtype for parameter in fast.model.parameters()} == {torch.float32}


def test_a_finished_run_has_its_files_and_is_left_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(load_recipe(small))
    rows = list(RunDir(run).metrics())
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["tokens"] == row["step"] * 6 * 64 for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [20, 40]
    assert 0 < rows[-1]["validation_bits_per_byte"] < rows[19]["validation_bits_per_byte"] < 8
    assert [folder.name for folder in checkpoint.list_committed(run)] == ["step-00000030", "step-00000040"]
    assert [row["event"] for row in RunDir(run).events()] == [
        "start", *["checkpoint"] * 4, "done",
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "metrics" in path.name}
    train(load_recipe(small))
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_weights(small: Path, work_dir: Path, reference_run: Path) -> None:
    run = work_dir / "runs/small"
    chance = random.Random(5)
    for kill in range(4):
        with start_training(small, work_dir) as life:
            # Not before the first step, so that each life gets somewhere; then within about three checkpoints' time.
            reached, goal = len(read_metrics(run)), min(39, kill * 10 + chance.randrange(1, 10))
            life.wait_until(partial(has_metrics, run, goal), f"step {goal}")
            time.sleep(chance.random() * 0.05)
            life.process.kill()
            life.end()
        assert len(read_metrics(run)) >= min(reached, goal)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')  # a row that a kill cut off
    train(load_recipe(small))
    assert same_weights(run, reference_run)
    assert read_losses(run) == read_losses(reference_run)
    assert read_events(run, "resume")


def test_another_recipe_is_refused_by_the_field_that_differs(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(load_recipe(small, **{"train.tokens": 10 * 6 * 64}))
    with pytest.raises(InputError, match=r"train.tokens was 3840, is 7680; .*--allow-change"):
        train(load_recipe(small, **{"train.tokens": 20 * 6 * 64}))
    run = train(load_recipe(small, **{"train.tokens": 20 * 6 * 64}), allow_change=True)
    assert [row["step"] for row in RunDir(run).metrics()] == list(range(1, 21))


def test_another_tokenizer_than_the_stores_is_refused(small: Path, tmp_path: Path) -> None:
    train_tokenizer(["some other text " * 50], 285).save(tmp_path / "other", 128)
    with pytest.raises(InputError, match=r"other: not the tokenizer that .*store was made with"):
        build_state(load_recipe(small, tokenizer=str(tmp_path / "other")))


def test_two_processes_never_train_one_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs/small"), "lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training this run"):
            train(load_recipe(small))
        other.communicate()


@pytest.mark.slow
def test_under_torchrun_three_ranks_learn_what_one_learns(small: Path, work_dir: Path) -> None:
    """Of 2 and 4, and of what each reads, tests/train/test_distributed.py tells."""
    recipe = write_recipe(work_dir, small, "three", **{"train.tokens": 8 * 6 * 64})
    done = run_torchrun(work_dir, 3, "-m", "tinyllama", "train", recipe)
    assert done.returncode == 0, done.stderr
    alone = train(Recipe.load(work_dir / recipe, {"name": "alone"}))
    assert metric_by_step(work_dir, "three") == pytest.approx(metric_by_step(work_dir, alone.name), rel=1e-5)
    assert checkpoint.read_state(checkpoint.checkpoint_folder(work_dir / "runs/three", 8))["ranks"] == 3


def test_without_a_compiler_it_says_so_and_trains_uncompiled(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    trainer = build_state(load_recipe(small, **{"train.compile": True}))
    assert "no C++ compiler" in capsys.readouterr().err
    assert step_of(trainer, 0) == pytest.approx(step_of(build_state(load_recipe(small)), 0))
