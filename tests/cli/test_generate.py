"""`tinyllama generate` with a random model: prompts, samples, seeds and streaming."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.release.formats import random_model

from tinyllama import cli
from tinyllama.api import generate_text
from tinyllama.model import generation
from tinyllama.release.release import write_hugging_face
from tinyllama.tokenizer import Tokenizer

PROMPT = "import os"


@pytest.fixture(scope="module")
def model(small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = Tokenizer.load(small / "tokenizer")
    write_hugging_face(folder, random_model(tokenizer.vocab_size), tokenizer)
    return str(folder)


def generated(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> tuple[str, str]:
    assert cli.main(["generate", model, *arguments, "--max-new-tokens", "12"]) == 0
    output = capsys.readouterr()
    return output.out, output.err


def test_text_is_sampled_and_the_stated_seed_repeats_it(capsys: pytest.CaptureFixture[str], model: str) -> None:
    first, notes = generated(capsys, model, PROMPT)
    (seed,) = re.fullmatch(r"seed (\d+)\n", notes).groups()  # type: ignore[union-attr]
    assert first.startswith(PROMPT)
    assert generated(capsys, model, PROMPT, "--seed", seed) == (first, notes)
    assert generated(capsys, model, PROMPT)[0] != first


def test_temperature_0_is_greedy_and_states_no_seed(capsys: pytest.CaptureFixture[str], model: str) -> None:
    text, notes = generated(capsys, model, PROMPT, "--temperature", "0")
    assert not notes
    assert text == generate_text(model, PROMPT, 12) + "\n"


def test_each_sample_equals_the_sample_of_its_seed(capsys: pytest.CaptureFixture[str], model: str) -> None:
    samples, notes = generated(capsys, model, PROMPT, "--num-samples", "3", "--seed", "7")
    single = [generated(capsys, model, PROMPT, "--seed", str(seed))[0] for seed in (7, 8, 9)]
    assert samples == "---\n".join(single)
    assert notes == "seed 7\nseed 8\nseed 9\n"
    assert len(set(single)) == 3


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_is_read_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, arguments: list[str]
) -> None:
    expected = generated(capsys, model, f"{PROMPT}\nä\n", "--seed", "1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\nä\n\n".encode()), encoding="ascii"))
    assert generated(capsys, model, *arguments, "--seed", "1") == expected


def test_binary_input_and_a_missing_prompt_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert cli.main(["generate", model]) == 2
    assert "not UTF-8 text (byte 1)" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cli.main(["generate", model]) == 2
    assert "generate: no prompt" in capsys.readouterr().err


def test_restricted_sampling_is_greedy_in_the_limit(capsys: pytest.CaptureFixture[str], model: str) -> None:
    greedy = generated(capsys, model, PROMPT, "--temperature", "0")[0]
    for flags in (["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]):
        assert generated(capsys, model, PROMPT, *flags)[0] == greedy
    assert generated(capsys, model, PROMPT, "--temperature", "0", "--repetition-penalty", "5")[0] != greedy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature: -1.0 is out of range"),
        (["--top-p", "0"], "top_p: 0.0 is out of range"),
        (["--min-p", "2"], "min_p: 2.0 is out of range"),
        (["--repetition-penalty", "0"], "repetition_penalty: 0.0 is out of range"),
        (["--top-k", "0"], "top_k: 0 is out of range"),
        (["--num-samples", "0"], "num_samples: 0 is out of range"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0 is out of range"),
        (["--seed", "-1"], "seed: -1 is out of range"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], model: str, flags: list[str], message: str
) -> None:
    assert cli.main(["generate", model, PROMPT, "--seed", "1", *flags]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert message in line
    assert not output.out


def test_text_is_printed_while_it_is_generated(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    pipe, printed = io.BytesIO(), []
    generate = generation.generate

    def observed(*args: Any, **options: Any) -> Iterator[int]:
        for token in generate(*args, **options):
            yield token
            printed.append(pipe.getvalue().decode())

    monkeypatch.setattr(generation, "generate", observed)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, encoding="utf-8"))
    assert cli.main(["generate", model, PROMPT, "--max-new-tokens", "40", "--seed", "1"]) == 0
    assert printed[0].startswith(PROMPT)
    assert len(set(printed)) > 10
    assert pipe.getvalue().decode().startswith(printed[-1])


@pytest.mark.parametrize(
    ("command", "problem"), [("generate", "no model found"), ("report", "no run here"), ("watch", "no run here")]
)
def test_similar_name_of_a_run_is_suggested(
    command: str, problem: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    following = ["text"] if command == "generate" else []
    for name in ("demo", "dmo"):
        assert cli.main([command, name, *following]) == 2
        err = capsys.readouterr().err
        assert f"{name}: {problem}" in err and err.endswith("; did you mean runs/demo?\n")
    for name in ("elsewhere", "runs/demo"):
        assert cli.main([command, name, *following]) == 2
        assert "did you mean" not in capsys.readouterr().err
