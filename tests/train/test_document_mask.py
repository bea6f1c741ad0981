"""Training with a document mask: transformers' losses step by step, validation, and what a resume compares."""

from pathlib import Path

import pytest
import torch
from tests.model.test_document_mask import visible
from tests.train.launch import read_losses, read_metrics
from tests.train.single_process import SINGLE_PROCESS, build_state, load_recipe, train_step
from tests.train.transformers_reference import transformers_reference
from torch.nn import functional as F

from tinyllama.data.batches import batches
from tinyllama.errors import InputError
from tinyllama.train.loop import train
from tinyllama.train.validation import validate

pytest_plugins = ["tests.train.fixtures"]

MASK = {"train.document_mask": True}


def test_loss_follows_transformers_with_a_mask_and_positions_that_restart(small: Path) -> None:
    """The loss counts every target, also that of a document's last token: the first token of the next document."""
    recipe = load_recipe(small, **MASK)
    state = build_state(recipe)
    reference, optimizer = transformers_reference(state)
    num_documents = 0
    for step, (sequences, starts) in zip(range(12), batches(recipe, state.store, 0), strict=False):
        assert starts is not None
        num_documents += sum(row.unique().numel() for row in starts)
        for group in optimizer.param_groups:
            group["lr"] = recipe.train.learning_rate_at(step)
        positions = torch.arange(64) - starts
        logits = reference(sequences[:, :-1], attention_mask=visible(starts), position_ids=positions).logits
        expected = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss, _ = train_step(state, step, sequences, starts)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4), step
    assert num_documents > 1.5 * 12 * 6


def test_training_and_validation_use_the_mask(small: Path, work_dir: Path) -> None:
    fields = {"train.tokens": 8 * 384, "train.validate_every_steps": 4}
    masked, plain = (train(load_recipe(small, **fields, **own)) for own in (MASK | {"name": "masked"}, {}))
    assert all(ours != theirs for ours, theirs in zip(read_losses(masked), read_losses(plain), strict=True))
    recipe = load_recipe(small, **fields, **MASK, name="masked")
    state = build_state(recipe)
    for step, (sequences, starts) in enumerate(batches(recipe, state.store, 0)):
        assert read_losses(masked)[step][1] == train_step(state, step, sequences, starts)[0]
    found = state.validation_set
    assert found is not None and found.document_starts is not None
    with torch.no_grad():
        logits = state.model(found.sequences[:, :-1], document_starts=found.document_starts).flatten(0, 1)
    expected = F.cross_entropy(logits, found.sequences[:, 1:].flatten()).item()
    assert read_metrics(masked)[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    for micro_batch_size in (3, 64):  # with padding
        assert validate(state.model, found, micro_batch_size, SINGLE_PROCESS).loss == pytest.approx(expected, rel=1e-5)


def test_a_changed_mask_is_a_change_of_the_run(small: Path, work_dir: Path) -> None:
    first, longer = {"train.tokens": 384, "checkpoint.every_steps": 1}, {"train.tokens": 768}
    run = train(load_recipe(small, **first))
    with pytest.raises(InputError, match=r"train.document_mask was None, is True; .*--allow-change"):
        train(load_recipe(small, **first, **MASK))
    train(load_recipe(small, **longer, **MASK), allow_change=True)
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    with pytest.raises(InputError, match=r"train.document_mask was True, is None"):
        train(load_recipe(small, **longer))


def test_a_run_of_a_version_without_masks_resumes(small: Path, work_dir: Path) -> None:
    fields = load_recipe(small).fields_affecting_weights()
    assert "train.document_mask" not in fields  # as in checkpoints of earlier versions
    assert load_recipe(small, **MASK).fields_affecting_weights() == fields | MASK
