"""The command line: output, exit status and files."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.conftest import small_recipe

from tinyllama import cli

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[2] / "recipes/demo.yaml"


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
        (["run", "."], ".: a folder, not a recipe; run: tinyllama init ."),
        (["inspect", str(DEMO)], f"token store does not exist; run: tinyllama prepare {DEMO}"),
        (["train", "demo", "--train.tokns", "3"], "--train.tokns: unknown field; did you mean tokens?"),
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
        (["train", "demo", "--alow-change"], "--alow-change: unknown option; did you mean --allow-change?"),
        (
            ["train", "demo", "--data.store", "nowhere"],
            "runs/demo/tokenizer: no tokenizer here; run: tinyllama tokenizer train demo --data.store nowhere",
        ),
        (["generate", "nowhere", "text"], "nowhere: no model found"),
        (["release", "nowhere"], "nowhere: no model found"),
        (["release", "nowhere", "--step", "5"], "nowhere: not a run"),
        (["evaluate", "nowhere"], "nowhere: no model found"),
        (["generate", "runs/nowhere", "text"], "runs/nowhere: no model found; give a run,"),
        (["verify", "nowhere"], "nowhere: no release here (no release.json); run: tinyllama release RUN"),
        (["watch", "nowhere"], "nowhere: no run here"),
        (["tokenizer", "import", "nowhere", "there"], "nowhere"),
    ],
)
def test_wrong_input_is_refused_with_exit_status_2(
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


def test_command_process_prints_one_line(tmp_path: Path) -> None:
    done = tinyllama("train", "demo", "--train.tokns", "3", folder=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stdout, done.stderr, "train.tokns")


def assert_one_line(stdout: str, stderr: str, message: str) -> None:
    assert message in stderr
    assert stderr.startswith("tinyllama: ")
    assert stderr.count("\n") == 1
    assert not stdout


def test_unusable_data_is_refused_and_leaves_no_store(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, store = recipe.parent / "raw", recipe.parent / "store"
    raw.mkdir()
    assert cli.main(["prepare", str(recipe), "--data.sources.modules.path", str(raw)]) == 2
    assert_one_line(*capsys.readouterr(), f" under {raw}; ")
    assert cli.main(["train", str(recipe)]) == 2
    assert_one_line(*capsys.readouterr(), f"the token store does not exist; run: tinyllama prepare {recipe}\n")
    store.write_text("a file where a folder belongs")
    assert cli.main(["prepare", str(recipe)]) == 2
    assert_one_line(*capsys.readouterr(), str(store))


def test_help_lists_commands_and_recipe_fields(tmp_path: Path) -> None:
    assert "evaluate" in tinyllama("--help", folder=tmp_path).stdout
    fields = tinyllama("train", "demo", "--help-all", folder=tmp_path).stdout
    for field in ("--train.tokens", "--model.kv_heads", "--data.sources.slimpajama.weight", "--allow-change"):
        assert field in fields
    assert "--temperature" in tinyllama("generate", "--help", folder=tmp_path).stdout


def test_stages_produce_release_that_completes_text(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    # Measuring the peak after each checkpoint would take longer than the run.
    monkeypatch.setattr("tinyllama.hardware.peak_flops", lambda device, precision: None)
    own, release = ["recipe.yaml", "--tokenizer", "tokenizer"], "runs/small/releases/step-00000040"
    for command, following in (
        (["tokenizer", "train", *own, "--vocab-size", "500"], ["prepare", *own]),
        (["prepare", *own], ["train", *own]),
        (["train", *own], ["release", "runs/small"]),
        (["release", "runs/small"], ["verify", release]),
        (["train", *own], ["verify", release]),
        (["verify", "runs/small"], ["generate", release, "'Once upon a time'"]),
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == f"next: tinyllama {' '.join(following)}"
        assert "next: " not in printed.out
    assert cli.main(["train", *own, "--quiet"]) == 0
    assert capsys.readouterr() == ("run: runs/small\n", "")
    assert cli.main(["verify", release, "--json"]) == 0
    assert "next: " not in capsys.readouterr().err
    words = ["import os", "--max-new-tokens", "8"]
    for model in ("runs/small", "runs/small/checkpoints/step-00000040"):
        assert cli.main(["generate", model, *words]) == 0
        assert capsys.readouterr().out.startswith("import os")
    done = tinyllama("generate", "runs/small/releases/step-00000040", *words, folder=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
    assert cli.main(["release", "runs/small"]) == 2
    assert f"already released; check the release with `tinyllama verify {release}`" in capsys.readouterr().err
