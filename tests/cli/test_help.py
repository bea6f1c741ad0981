"""Help pages, suggestions and messages of the command line."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
import yaml
from tests.conftest import small_recipe

from tinyllama import cli
from tinyllama.cli.arguments import describe
from tinyllama.recipe import Recipe, flatten

RECIPE_COMMANDS = ("demo", "run", "doctor", "tokenizer train", "prepare", "plan", "train")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"], ["-h"], ["tokenizer"]])
def test_overview_lists_each_command_once_in_a_group(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    lines = printed(capsys, *arguments).splitlines()
    groups = [line.removesuffix(":") for line in lines if re.fullmatch("[a-z]+:", line)]
    assert groups == list(cli.GROUPS)
    named = [line.strip().split("  ")[0] for line in lines if line.startswith("  ")]
    assert named == list(cli.COMMANDS)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_short_and_shows_the_options_of_the_parser(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = printed(capsys, *name.split(), "--help")
    assert text == printed(capsys, "help", *name.split())
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: tinyllama {name} ")
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80
    is_with_recipe = name in RECIPE_COMMANDS
    assert is_with_recipe == ("--train.FIELD VALUE" in text) == ("--help-all" in text)
    assert "--train.optimizer" not in text
    shown = {match[1] for match in re.finditer(r"^  (--[a-z_-]+)", text, re.MULTILINE)}
    function = functools.partial(cli.COMMANDS[name], *([None] if is_with_recipe else []))
    parser = tyro.extras.get_parser(function, config=(tyro.conf.FlagCreatePairsOff,))
    own = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    fields = {f"--{field}" for field in Recipe.model_fields if is_with_recipe}
    assert shown - fields - {"--help-all", "--quiet"} == own | {"--help"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_two_examples_that_are_valid(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_recipe(small)))
    monkeypatch.chdir(tmp_path)
    examples = describe(name, cli.COMMANDS[name]).examples
    assert len(examples) == 2
    for line in examples:
        (command,) = re.findall(r"tinyllama ([^|>)]*)", line)
        words = [first or second for first, second in re.findall(r'"([^"]*)"|(\S+)', command)]
        assert " ".join(words).startswith(name)
        assert callable(cli.parse_command(words))


def test_help_all_lists_every_field_with_the_value_of_the_recipe(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.load(small / "recipe.yaml")
    text = printed(capsys, "train", str(small / "recipe.yaml"), "--help-all", "--train.tokens", "5M")
    shown = re.findall(r"^  --([a-z0-9_.]+)", text, re.MULTILINE)
    assert set(flatten(recipe.model_dump())) <= set(shown)
    assert "--train.tokens 5000000" in text
    assert "--data.sources.lines.weight 0.3" in text
    assert "--allow-change" in text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["completion", "bash"]])
def test_help_and_completion_do_not_import_torch(arguments: list[str]) -> None:
    program = f"import sys; from tinyllama import cli; cli.main({arguments}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"tinyllama \d+\.\d+\.\d+\S*\n", printed(capsys, "--version"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("trian demo", "trian: no such command; did you mean train?"),
        ("tok", "tok: no such command; did you mean tokenizer train?"),
        ("tokenizer trian demo", "did you mean tokenizer train?"),
        ("train demo --lr 3e-4", "--lr: unknown option; did you mean --train.optimizer.learning_rate?"),
        ("train demo --train.learning_rate 3e-4", "did you mean train.optimizer.learning_rate?"),
        ("train demo --learning-rate=3e-4", "did you mean --train.optimizer.learning_rate?"),
        ("train demo --epochs 3", "did you mean --train.tokens (the number of training tokens"),
        ("train demo --batch_size 8", "did you mean --train.batch_sequences?"),
        ("train demo --train.batch_size 8", "did you mean train.batch_sequences?"),
        ("train demo --model.hidden_size 8", "did you mean model.dim?"),
        ("train demo --tokens 8", "did you mean --train.tokens?"),
        ("train demo --train.tokns 8", "did you mean tokens?"),
        ("train demo --nam x", "did you mean --name or --train.optimizer.name or --train.schedule.name?"),
        ("train demo --alow-change", "did you mean --allow-change?"),
        ("generate m p --temp 1", "did you mean --temperature?"),
        ("generate m p --max-tokens 1", "did you mean --max-new-tokens?"),
        ("generate", "MODEL missing; usage: tinyllama generate MODEL [PROMPT]"),
        ("tokenizer import there", "DIRECTORY missing"),
        ("generate m two words", "words: unexpected; usage:"),
        ("generate m p --top-k many", "--top-k: 'many' is not valid; give an integer"),
        ("generate m p --temperature hot", "--temperature: 'hot' is not valid; give a number"),
        ("generate m p --seed", "--seed: no value; give an integer"),
        ("evaluate m --precision fp8", "--precision: 'fp8' is not valid; give one of bf16, fp16, fp32"),
        ("completion tcsh", "SHELL: 'tcsh' is not valid; give one of bash, zsh, fish"),
    ],
)
def test_wrong_words_are_refused_with_a_hint(capsys: pytest.CaptureFixture[str], arguments: str, hint: str) -> None:
    assert cli.main(arguments.split()) == 2
    output = capsys.readouterr()
    assert hint in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_every_foreign_name_leads_to_a_field() -> None:
    from tinyllama.recipe.loading import _FOREIGN_NAMES

    fields = {*flatten(Recipe.load("demo").model_dump())}
    assert {target.partition(" ")[0] for target in _FOREIGN_NAMES.values()} <= fields
