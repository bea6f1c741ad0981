"""Training: transformers' losses step by step, changed recipes, locks and the compiler."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.conftest import locked_by_another_process
from tests.data.reading import batch_of_step
from tests.train.launch import read_events, read_metrics
from tests.train.single_process import build_state, load_recipe, train_step
from tests.train.transformers_reference import transformers_reference

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of, write_json
from tinyllama.model import attention
from tinyllama.prepare.pipeline import build_store
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer.training import train_tokenizer, training_text
from tinyllama.train.loop import train
from tinyllama.train.setup import TrainState

pytest_plugins = ["tests.train.fixtures"]


def loss_of_step(state: TrainState, step: int) -> float:
    """Do a step and return its loss."""
    return float(train_step(state, step, batch_of_step(state.recipe, state.store, step))[0])


SCALING = {"type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4, "original_context_length": 32}


@pytest.mark.parametrize("shape", [{}, {"model.head_dim": 24, "model.rope_scaling": SCALING}], ids=["plain", "llama3"])
def test_loss_follows_transformers_and_its_adamw_step_by_step(small: Path, shape: dict[str, object]) -> None:
    recipe = load_recipe(small, **shape)
    state = build_state(recipe)
    reference, optimizer = transformers_reference(state)
    for step in range(20):
        batch = batch_of_step(recipe, state.store, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.train.learning_rate_at(step)
        inputs, targets = batch[:, :-1], batch[:, 1:].contiguous()
        expected = reference(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss, _ = train_step(state, step, batch)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4), f"step {step}"
    assert float(loss) < 5.5  # a uniform guess over 600 tokens has a loss of 6.4


def test_token_ids_outside_the_vocabulary_name_the_store(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "store", tmp_path / "store")
    for shard in (tmp_path / "store").glob("*/train/*.tokens"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(InputError, match=f"{tmp_path / 'store'}: token id 65535 .*--verify"):
        train(load_recipe(small, **{"data.store": str(tmp_path / "store"), "name": "damaged"}))


def test_micro_batch_size_changes_only_rounding(small: Path) -> None:
    losses = []
    for size in (1, 2, 6):
        state = build_state(load_recipe(small, **{"train.micro_batch_sequences": size}))
        losses.append([loss_of_step(state, step) for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_token_ids_beyond_two_bytes_are_stored_and_trained_on(small: Path, tmp_path: Path) -> None:
    """Llama 3's vocabulary has 128,256 tokens; here, a small one's ids are moved to the end of 66,500 ids."""
    document = read_json(small / "tokenizer/tokenizer.json")
    special, first = len(document["added_tokens"]), 66_500 - len(document["model"]["vocab"])
    moved = {token: number + first * (number >= special) for token, number in document["model"]["vocab"].items()}
    document["model"]["vocab"] = moved | {f"unused{number}": number for number in range(special, first + special)}
    shutil.copytree(small / "tokenizer", tmp_path / "wide", ignore=lambda *_: {"tokenizer.model"})
    write_json(tmp_path / "wide/tokenizer.json", document)
    paths = {"tokenizer": str(tmp_path / "wide"), "data.store": str(tmp_path / "store")}
    recipe = load_recipe(small, **paths)
    build_store(recipe)
    state = build_state(recipe)
    assert state.model.vocab_size == 66_500
    batch, narrow = batch_of_step(recipe, state.store, 0), TokenStore.open(small / "store")
    expected = batch_of_step(load_recipe(small), narrow, 0)
    assert torch.equal(torch.where(batch >= special, batch - first, batch), expected)
    assert int(batch.max()) > 1 << 16
    losses = [loss_of_step(state, step) for step in range(2)]
    assert losses[0] == pytest.approx(math.log(66_500), rel=0.1)
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_compiled_bf16_follows_float32(small: Path) -> None:
    exact = build_state(load_recipe(small))
    fast = build_state(load_recipe(small, **{"train.precision": "bf16", "train.compile": True}))
    for step in range(5):
        assert loss_of_step(fast, step) == pytest.approx(loss_of_step(exact, step), rel=1e-2)
    assert {parameter.dtype for parameter in fast.model.parameters()} == {torch.float32}


def test_compile_cache_has_a_key_for_this_version_of_the_custom_operators(small: Path) -> None:
    build_state(load_recipe(small, **{"train.compile": True}))
    assert torch.compiler.config.cache_key_tag == sha256_of(Path(attention.__file__))


def test_finished_run_has_its_files_and_is_not_trained_again(small: Path, work_dir: Path) -> None:
    run = train(load_recipe(small))
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["tokens"] == row["step"] * 6 * 64 for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [20, 40]
    for name in ("validation_bits_per_byte", "validation_bits_per_byte/modules", "validation_bits_per_byte/lines"):
        assert 0 < rows[-1][name] < rows[19][name] < 8
    losses = [rows[-1][name] for name in ("validation_loss/modules", "validation_loss", "validation_loss/lines")]
    assert losses in (sorted(losses), sorted(losses, reverse=True))
    assert [checkpoint.step for checkpoint in RunDir(run).checkpoints()] == [30, 40]
    assert [row["event"] for row in read_events(run)] == ["start", *["checkpoint"] * 4, "done"]
    before = (run / "metrics.jsonl").read_bytes()
    train(load_recipe(small))
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value", "is_allowable"), [("train.tokens", 768, True), ("train.batch_sequences", 12, False)]
)
def test_changed_recipe_is_refused_with_the_field_that_differs(
    small: Path, work_dir: Path, field: str, value: int, is_allowable: bool
) -> None:
    train(load_recipe(small, **{"train.tokens": 384}))
    changed = {"train.tokens": 768, field: value}
    with pytest.raises(InputError, match=rf"{field} was \d+, is {value}\b.*--name") as error:
        train(load_recipe(small, **changed))
    assert ("--allow-change" in str(error.value)) == is_allowable
    train(load_recipe(small, **changed, name="other"))
    if is_allowable:
        run = train(load_recipe(small, **changed), allow_change=True)
        assert [row["step"] for row in read_metrics(run)] == [1, 2]


def test_resume_with_another_rotary_embedding_is_refused(small: Path, work_dir: Path) -> None:
    shape = {"train.tokens": 384, "model.rope_scaling": SCALING}
    train(load_recipe(small, **shape))
    with pytest.raises(InputError, match=r"model\.rope_scaling\.factor was 4.0, is 8.0; undo"):
        train(load_recipe(small, **shape, **{"model.rope_scaling.factor": 8}))
    with pytest.raises(InputError, match=r"model\.rope_scaling\.type was 'llama3', is None; undo"):
        train(load_recipe(small, **{"train.tokens": 384}))


def test_resume_with_another_tokenizer_is_refused_with_short_hashes(small: Path, work_dir: Path) -> None:
    train(load_recipe(small, **{"train.tokens": 384}))
    train_tokenizer(training_text(["some other text " * 50]), 285).save(work_dir / "other", 128)
    recipe = load_recipe(small, **{"train.tokens": 384, "tokenizer": "other", "data.store": "other-store"})
    build_store(recipe)
    changes = [rf"another {name} \(sha256 was \w{{12}}, is \w{{12}}\); " for name in ("token store", "tokenizer")]
    with pytest.raises(InputError, match="".join(changes)) as error:
        train(recipe)
    assert "--allow-change" not in str(error.value)


def test_tokenizer_must_be_the_stores(small: Path, tmp_path: Path) -> None:
    train_tokenizer(training_text(["some other text " * 50]), 285).save(tmp_path / "other", 128)
    with pytest.raises(InputError, match=r"other: .*tokenizer.*store"):
        build_state(load_recipe(small, tokenizer=str(tmp_path / "other")))


def test_second_process_is_refused(small: Path, work_dir: Path) -> None:
    with locked_by_another_process(work_dir / "runs/small"), pytest.raises(InputError, match="another process"):
        train(load_recipe(small))


def test_without_a_compiler_training_warns_and_runs_uncompiled(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    state = build_state(load_recipe(small, **{"train.compile": True}))
    assert "no C++ compiler" in capsys.readouterr().err
    assert loss_of_step(state, 0) == pytest.approx(loss_of_step(build_state(load_recipe(small)), 0))
