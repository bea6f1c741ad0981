"""The command line: output, exit status and files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import zstandard
from tests.conftest import python_sources, small_recipe, write_jsonl

from tinyllama import cli
from tinyllama.tokenizer.training import train_tokenizer, training_text

pytestmark = pytest.mark.slow


def tinyllama(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinyllama", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.fixture
def recipe(small: Path, tmp_path: Path) -> Path:
    """Return a copy of the small data set's recipe with its own store, not prepared yet."""
    fields = small_recipe(small)
    fields["data"]["store"] = str(tmp_path / "store")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "demo"], "trian: no such command"),
        (["train"], "train: name a recipe first"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["train", "demo", "--train.tokns", "3"], "train.tokns: unknown field; did you mean tokens?"),
        (
            ["train", "demo", "--train.batch_sequences", "many"],
            "train.batch_sequences: 'many' should be a valid integer",
        ),
        (["train", "demo", "--model.heads", "7"], "heads 7 do not divide dim 256"),
        (["demo", "--data.sources.slimpajama.path", "mine"], "demo: recipe 'demo' has its own sources"),
        (["train", "demo", "--train.tokens"], "--train.tokens: missing value"),
        (["train", "--allow-change", "demo"], "train: name a recipe first"),
        (["train", "demo", "--model", "{dim: 4"], "--model: not valid YAML: expected ',' or '}'"),
        (["train", "demo", "--model", "{dim: 4, dim: 8}"], "--model: not valid YAML: 'dim' is a duplicate key"),
        (["train", "demo", "--alow-change"], "Unrecognized options: --alow-change"),
        (
            ["train", "demo", "--data.store", "nowhere"],
            "nowhere: the token store does not exist; run `tinyllama prepare`",
        ),
        (["generate", "nowhere", "text"], "nowhere: no model found"),
        (["release", "nowhere"], "nowhere: no model found"),
        (["release", "nowhere", "--step", "5"], "nowhere: no run here"),
        (["evaluate", "nowhere"], "nowhere: no model found"),
        (["watch", "nowhere"], "nowhere: no run here"),
        (["tokenizer", "import", "nowhere", "there"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert_one_line(*capfd.readouterr(), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "--train.tokns", "3"], "train.tokns: unknown field; did you mean tokens?"),
        (["evaluate", "nowhere"], "nowhere: no model found"),
    ],
)
def test_command_process_prints_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = tinyllama(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stdout, done.stderr, message)
    assert not list(tmp_path.iterdir())


def assert_one_line(stdout: str, stderr: str, message: str) -> None:
    assert message in stderr
    assert stderr.startswith("tinyllama: ")
    assert stderr.count("\n") == 1
    assert not stdout


def test_unusable_data_is_one_line_and_leaves_no_store(recipe: Path) -> None:
    raw = recipe.parent / "raw"
    raw.mkdir()
    nothing = tinyllama("prepare", recipe, "--data.sources.modules.path", raw, folder=recipe.parent)
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1)
    assert nothing.stderr.startswith("tinyllama: data.sources.modules: no .jsonl or ")
    assert f" under {raw}; " in nothing.stderr
    packed = zstandard.compress(write_jsonl(raw / "a", python_sources(10)).read_bytes())
    (raw / "a").unlink()
    (raw / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    cut = tinyllama("prepare", recipe, "--data.sources.modules.path", raw, folder=recipe.parent)
    assert cut.returncode == 2
    assert "cut.jsonl.zst: cannot be read" in cut.stderr
    assert "Traceback" not in cut.stderr
    train = tinyllama("train", recipe, folder=recipe.parent)
    assert (train.returncode, train.stderr.count("\n")) == (2, 1)
    assert "the token store is not finished" in train.stderr


def test_unwritable_place_is_one_line(recipe: Path) -> None:
    (recipe.parent / "store").write_text("a file where a folder belongs")
    done = tinyllama("prepare", recipe, folder=recipe.parent)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"tinyllama: {recipe.parent / 'store'}" in done.stderr


def test_indivisible_batch_is_refused(small: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tinyllama"]
    done = subprocess.run(
        [sys.executable, *launch, "train", str(small / "recipe.yaml"), "--train.batch_sequences", "3"],
        check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "tinyllama: train.batch_sequences: 3 sequences do not divide among 2 ranks" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not list(tmp_path.rglob("step-*"))


def test_tokenizer_of_another_store_is_refused(small: Path, tmp_path: Path) -> None:
    train_tokenizer(training_text(["some other text " * 50]), 285).save(tmp_path / "other", 128)
    done = tinyllama("train", small / "recipe.yaml", "--tokenizer", tmp_path / "other", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "other: not the tokenizer that" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_help_lists_commands_and_recipe_fields(tmp_path: Path) -> None:
    assert "evaluate" in tinyllama("--help", folder=tmp_path).stdout
    fields = tinyllama("train", "demo", "--help", folder=tmp_path).stdout
    for field in ("--train.tokens", "--model.kv_heads", "--data.sources.slimpajama.weight", "--allow-change"):
        assert field in fields
    assert "--temperature" in tinyllama("generate", "--help", folder=tmp_path).stdout


def test_stages_produce_release_that_completes_text(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    # Measuring the peak after each checkpoint would take longer than the run.
    monkeypatch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
    own = [str(recipe), "--tokenizer", "tokenizer"]
    for command in (["tokenizer", "train", *own, "--vocab-size", "500"], ["prepare", *own], ["train", *own]):
        assert cli.main(command) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["release", "runs/small"]) == 0
    assert capsys.readouterr().out.strip() == "release: runs/small/releases/step-00000040"
    words = ["import os", "--max-new-tokens", "8"]
    for model in ("runs/small", "runs/small/checkpoints/step-00000040"):
        assert cli.main(["generate", model, *words]) == 0
        assert capsys.readouterr().out.startswith("import os")
    done = tinyllama("generate", "runs/small/releases/step-00000040", *words, folder=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
    assert cli.main(["release", "runs/small"]) == 2
    assert "already released; --force replaces it" in capsys.readouterr().err
