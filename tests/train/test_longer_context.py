"""A longer context: a run continues from the release of a run with a shorter context, and records what it changes."""

from pathlib import Path

import pytest
import torch
from tests.train.launch import read_events, read_metrics
from transformers import AutoModelForCausalLM, LlamaConfig

from tinyllama import cli
from tinyllama.data.batches import batches
from tinyllama.data.store import TokenStore
from tinyllama.files import read_json
from tinyllama.loading import load_model
from tinyllama.model.weights import config_to_hugging_face
from tinyllama.recipe import Recipe
from tinyllama.report.content import lineage_table, read_run
from tinyllama.runs.run_dir import RunDir

pytestmark = pytest.mark.slow

LONGER: dict[str, object] = {
    "model.context_length": 256,
    "train.sequence_length": 256,
    "train.batch_sequences": 4,
    "train.tokens": 4 * 4 * 256,
    "train.schedule.warmup_steps": 1,
    "train.document_mask": True,
    "train.validation_sequences": 4,
    "data.sources.modules.min_tokens": 256,
}
WAYS: dict[str, tuple[dict[str, object], list[str]]] = {
    "theta": ({"model.rope_theta": 40000.0}, ["model.rope_theta was 10000.0, is 40000.0"]),
    "linear": (
        {"model.rope_scaling": '{"type": "linear", "factor": 4}'},
        ["model.rope_scaling.type was None, is linear", "model.rope_scaling.factor was None, is 4.0"],
    ),
}
"""By way to a longer context: the fields of the model, and the recorded changes other than that of the length."""
RELEASE = "runs/small/releases/step-00000040"


def flags_of(fields: dict[str, object]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `small`, whose context has 64 tokens, its release, and a run per way from the release."""
    folder = tmp_path_factory.mktemp("longer")
    short: dict[str, object] = {"model.context_length": 64, "train.tokens": 40 * 384}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = str(small / "recipe.yaml")
        assert cli.main(["train", recipe, *flags_of(short)]) == 0
        assert cli.main(["release", "runs/small"]) == 0
        for way, (fields, _) in WAYS.items():
            own: dict[str, object] = {"name": way, "data.store": "store", "train.initial_weights": RELEASE}
            flags = flags_of(LONGER | fields | own)
            assert cli.main(["prepare", recipe, *flags]) == 0
            assert cli.main(["train", recipe, *flags]) == 0
    return folder


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_first_loss_is_that_of_transformers_with_the_changed_positions(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    recipe, store = Recipe.load(f"runs/{way}/recipe.yaml"), TokenStore.open("store")
    sequences, starts = next(batches(recipe, store, 0))
    assert sequences.shape == (4, 257)
    assert starts is not None and len(starts.unique()) > 1
    vocab_size = int(store.manifest["tokenizer"]["vocab_size"])
    config = LlamaConfig(**config_to_hugging_face(recipe.model, vocab_size, 1, 2))
    model = AutoModelForCausalLM.from_pretrained(f"{RELEASE}/huggingface", config=config, dtype=torch.float32)
    nats = 0.0
    for ids, own in zip(sequences, starts, strict=True):
        for begin in own.unique():  # transformers computes each document alone
            part, targets = ids[:-1][own == begin][None], ids[1:][own == begin][None]
            nats += float(model(input_ids=part, labels=part, shift_labels=targets).loss) * part.numel()
    assert read_metrics(Path("runs") / way)[0]["loss"] == pytest.approx(nats / starts.numel(), rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_changes_of_the_positions_are_recorded_and_shown(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run = RunDir(Path("runs") / way)
    changes = ["model.context_length was 64, is 256", *WAYS[way][1]]
    record = run.initial_weights()
    assert record is not None
    assert (record["source"], record["changed"]) == (RELEASE, changes)
    (start,) = read_events(run.path, "start")
    assert start["changed"] == changes
    assert run.find_checkpoint().state()["initial_weights"] == record
    assert any("; ".join(changes) in row[1] for row in lineage_table(read_run(run.path)).rows)


@pytest.mark.parametrize("way", WAYS)
def test_release_has_the_longer_context_and_lists_the_changes(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["release", f"runs/{way}"]) == 0
    (release,) = Path(f"runs/{way}/releases").glob("step-*")
    config = read_json(release / "huggingface/config.json")
    assert config["max_position_embeddings"] == 256
    assert load_model(release).config.context_length == 256
    card = (release / "huggingface/README.md").read_text()
    assert "; model.context_length was 64, is 256; " + WAYS[way][1][0] in card


def test_start_prints_the_changes(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    fields = LONGER | {"name": "printed", "data.store": "store", "train.initial_weights": RELEASE}
    assert cli.main(["train", str(small / "recipe.yaml"), *flags_of(fields), "--train.tokens", "1024"]) == 0
    assert f"weights of {RELEASE}; model.context_length was 64, is 256\n" in capsys.readouterr().err
