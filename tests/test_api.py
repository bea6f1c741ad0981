"""The package in Python: public names, runs, generation, and errors for wrong arguments."""

import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.reading import documents_of
from tests.tracking.run_files import new_run, write_resume, write_steps

import tinyllama
from tinyllama.evaluate.results import Evaluation


@pytest.fixture(scope="module")
def recipe(small: Path) -> tinyllama.Recipe:
    return tinyllama.Recipe.load(small / "recipe.yaml", {"train.tokens": 8 * 6 * 64, "checkpoint.every_steps": 4})


@pytest.fixture(scope="module")
def trained(recipe: tinyllama.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinyllama.Run]:
    with pytest.MonkeyPatch.context() as patch:
        # Measuring the peak after each checkpoint would take longer than the run.
        patch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
        patch.chdir(tmp_path_factory.mktemp("trained"))
        yield tinyllama.train_model(recipe)


@pytest.mark.parametrize("name", tinyllama.__all__)
def test_public_name_and_its_methods_have_docstrings(name: str) -> None:
    value = getattr(tinyllama, name)
    own = vars(value).items() if inspect.isclass(value) else ()
    members = [member for key, member in own if not key.startswith("_")]
    documented = [member for member in members if inspect.isroutine(member) or isinstance(member, property)]
    assert all(inspect.getdoc(one) for one in (value, *documented))


def test_completion_lists_the_public_names_and_the_version() -> None:
    assert dir(tinyllama) == sorted([*tinyllama.__all__, "__version__"])
    assert tinyllama.__version__ == version("tinyllama")
    assert tinyllama.__all__ == sorted(tinyllama.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tinyllama.no_such_name


def test_import_of_torch_free_names_and_reading_of_runs_do_not_load_torch(tmp_path: Path) -> None:
    run, log = new_run(tmp_path)
    write_steps(log, 1, 2)
    program = Path(__file__).with_name("public_names_program.py")
    subprocess.run([sys.executable, program, run.path], check=True, timeout=60)


def test_metrics_are_columns_with_nan_for_missing_numbers(tmp_path: Path) -> None:
    run_dir, log = new_run(tmp_path)
    write_steps(log, 1, 2)
    by_source = {"validation_loss/a-b": 2.25}
    write_steps(log, 3, 3, validation_loss=2.5, skipped="loss is nan", loss=None, **by_source)
    metrics = tinyllama.Run.open(run_dir.path).metrics
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics["step"].dtype == np.int64
    np.testing.assert_array_equal(metrics["loss"], [9, 5, np.nan])
    np.testing.assert_array_equal(metrics["validation_loss"], [np.nan, np.nan, 2.5])
    np.testing.assert_array_equal(metrics["validation_loss/a-b"], [np.nan, np.nan, 2.25])
    assert metrics["skipped"].tolist() == ["", "", "loss is nan"]


def test_metrics_have_the_rows_of_a_rolled_back_run_once(tmp_path: Path) -> None:
    run_dir, log = new_run(tmp_path)
    write_steps(log, 1, 5)
    write_resume(log, 3)
    write_steps(log, 4, 6, change=1.0)
    run = tinyllama.Run.open(run_dir.path)
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.metrics["loss"][3] == 1 + 8 / 4 + 1.0
    assert [event["event"] for event in run.events] == ["start", "resume"]


def test_metrics_are_a_data_frame_where_pandas_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, log = new_run(tmp_path)
    empty = tinyllama.Run.open(run_dir.path)
    write_steps(log, 1, 3)
    run = tinyllama.Run.open(run_dir.path)
    frame = run.to_pandas()
    assert frame.index.tolist() == [1, 2, 3]
    assert frame["loss"].tolist() == run.metrics["loss"].tolist()
    assert len(empty.to_pandas()) == 3  # the metrics are read when they are used
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(tinyllama.InputError, match=r"pandas is not installed; pip install pandas"):
        run.to_pandas()


def test_run_without_rows_has_an_empty_column_of_steps(tmp_path: Path) -> None:
    run = tinyllama.Run.open(new_run(tmp_path)[0].path)
    assert {name: len(column) for name, column in run.metrics.items()} == {"step": 0}
    assert run.to_pandas().empty
    assert repr(run).endswith("runs/small: no checkpoint)")


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tinyllama.InputError, match="no run here"):
        tinyllama.Run.open(tmp_path)


def test_trained_run_has_its_recipe_checkpoints_and_models(recipe: tinyllama.Recipe, trained: tinyllama.Run) -> None:
    assert trained.path == Path("runs/small")
    assert trained.recipe == recipe
    assert [checkpoint.step for checkpoint in trained.checkpoints] == [4, 8]
    assert repr(trained) == "Run(runs/small: newest checkpoint at step 8)"
    newest, older = trained.model(), trained.model(step=4)
    assert not torch.equal(newest.embedding.weight, older.embedding.weight)
    assert torch.equal(newest.embedding.weight, tinyllama.load_model(trained).embedding.weight)
    with pytest.raises(tinyllama.InputError, match=r"no checkpoint of step 5; give one of 4, 8"):
        trained.model(step=5)


def test_run_path_and_loaded_model_generate_the_same_text(trained: tinyllama.Run) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    text = tinyllama.generate_text(trained, "import os", 12, **options)
    assert text.startswith("import os")
    assert len(text) > len("import os")
    assert tinyllama.generate_text("runs/small", "import os", 12, **options) == text
    model, tokenizer = trained.model(), trained.tokenizer()
    assert tinyllama.generate_text(model, "import os", 12, tokenizer=tokenizer, **options) == text
    parts = list(tinyllama.stream_text(trained, "import os", 12, tinyllama.Sampling(**options)))
    assert ("".join(parts), parts[0]) == (text, "import os")
    assert tinyllama.generate_text(trained, "import os", 12, temperature=0.8, seed=4) != text
    with pytest.raises(tinyllama.InputError, match="tokenizer: missing"):
        tinyllama.generate_text(model, "import os")


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        ("load_model", {"source": None}, "model: None"),
        ("release_run", {"model": 3}, "model: 3"),
        ("evaluate_model", {"model": None}, "model: None"),
        ("evaluate_model", {"model": "runs/small", "precision": "int4"}, "precision: 'int4'"),
        ("generate_text", {"model": None, "prompt": "x"}, "model: None"),
        ("generate_text", {"model": "runs/small", "prompt": ["x"]}, r"prompt: \['x'\]"),
        ("generate_text", {"model": "runs/small", "prompt": "x", "max_new_tokens": "x"}, "max_new_tokens: 'x'"),
        ("generate_text", {"model": "runs/small", "prompt": "x", "temperature": "a"}, "temperature: 'a'"),
    ],
    ids=["load", "release", "evaluate", "precision", "generate", "prompt", "max_new_tokens", "temperature"],
)
def test_argument_of_a_wrong_type_is_refused(function: str, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(tinyllama.InputError, match=problem):
        getattr(tinyllama, function)(**arguments)


def test_prompt_of_another_vocabulary_is_refused(trained: tinyllama.Run) -> None:
    model = tinyllama.Llama(trained.recipe.model, vocab_size=10)
    with pytest.raises(tinyllama.InputError, match="not in the vocabulary of 10 tokens"):
        tinyllama.generate_text(model, "import os", tokenizer=trained.tokenizer())


@pytest.mark.parametrize("source", ["mine.yaml", Path("mine.yaml")], ids=["str", "path"])
@pytest.mark.parametrize("name", ["prepare_store", "train_model", "train_tokenizer"])
def test_path_instead_of_a_recipe_is_refused_with_the_call_that_loads_it(name: str, source: Any) -> None:
    with pytest.raises(
        tinyllama.InputError, match=rf"{name}: expected a Recipe, not .*; load it: Recipe.load\('mine.yaml'\)"
    ):
        getattr(tinyllama, name)(source)


def test_tokenizer_and_store_are_made_from_a_recipe(recipe: tinyllama.Recipe, small: Path, tmp_path: Path) -> None:
    folders = {"tokenizer": str(tmp_path / "tokenizer"), "data.store": str(tmp_path / "store")}
    own = tinyllama.Recipe.load(small / "recipe.yaml", folders)
    tokenizer = tinyllama.train_tokenizer(own, vocab_size=500)
    assert len(tokenizer) == tinyllama.Tokenizer.load(own.tokenizer).vocab_size == 500
    store = tinyllama.prepare_store(own)
    assert store is not None
    assert set(store) == {"modules/train", "modules/validation", "lines/train", "lines/validation"}
    with pytest.raises(tinyllama.InputError, match=r"tokenizer: .* exists"):
        tinyllama.train_tokenizer(own, vocab_size=500)


def test_store_lists_its_splits_and_a_split_its_documents(recipe: tinyllama.Recipe) -> None:
    store = tinyllama.TokenStore.open(recipe.data.store)
    names = list(store)
    assert len(store) == len(names) == 4
    assert all(name in store for name in names)
    split, tokenizer = store["modules/train"], tinyllama.Tokenizer.load(recipe.tokenizer)
    documents = documents_of(split)
    assert len(split) == len(documents) == split.num_documents
    assert [ids.tolist() for ids in split] == [ids.tolist() for ids in documents]
    assert split[-1].tolist() == documents[-1].tolist() == split[len(split) - 1].tolist()
    assert "import" in tokenizer.decode(split[0])
    for number in (len(split), -len(split) - 1):
        with pytest.raises(IndexError, match="out of range"):
            _ = split[number]


def test_damaged_ends_of_documents_end_the_iteration_over_a_split(recipe: tinyllama.Recipe, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(recipe.data.store, tmp_path / "store"))
    ends = folder / "modules/train/00000.documents"
    ends.write_bytes(ends.read_bytes()[:-1] + b"\1")  # the last end is outside the shard
    with pytest.raises(tinyllama.InputError, match=r"00000\.documents: "):
        list(tinyllama.TokenStore.open(folder)["modules/train"])


def test_representations_are_one_short_line(recipe: tinyllama.Recipe, trained: tinyllama.Run) -> None:
    folder, (source, *_) = Path(recipe.data.store), recipe.data.sources
    store, tokenizer = tinyllama.TokenStore.open(folder), tinyllama.Tokenizer.load(recipe.tokenizer)
    evaluation = Evaluation(
        "m", 1, 1, None, "bfloat16", {"hellaswag": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}, {}, {}, {}, 1.0
    )
    found = {
        repr(recipe): "name='small'",
        str(recipe): "name='small'",
        repr(trained): "newest checkpoint at step 8",
        repr(trained.model()): "2 layers of width 64",
        repr(tokenizer).replace(str(Path(recipe.tokenizer).parent), ""): f"{len(tokenizer):,} tokens",
        repr(store).replace(str(folder.parent), ""): "4 splits",
        repr(store[f"{source}/train"]).replace(str(folder.parent), ""): "documents",
        repr(tinyllama.EvaluationResult(evaluation, Path("runs/small/evaluation.json"))): "hellaswag 25.00 ± 1.00",
    }
    for text, part in found.items():
        assert part in text
        assert len(text) <= 100, text
        assert "\n" not in text
