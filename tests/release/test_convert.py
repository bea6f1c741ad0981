"""Releases of external weights."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tests.release.formats import failed_checks
from tests.release.test_engines import plant_crash
from tests.vocabularies import add_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli
from tinyllama.files import read_json, write_json
from tinyllama.loading import HuggingFaceLlama
from tinyllama.release import convert
from tinyllama.release.convert import release_external_weights
from tinyllama.release.verify import Check, verify_release

pytestmark = pytest.mark.slow


@pytest.fixture
def llama(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released / "huggingface", tmp_path / "models/other")
    return "models/other"


def test_release_has_the_same_weights_and_their_source(llama: str) -> None:
    folder = release_external_weights(llama, ["huggingface"])
    assert folder == Path("releases/other")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).state_dict()
        for place in (llama, folder / "huggingface")
    )
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    metadata = read_json(folder / "release.json")
    assert metadata["initial_weights"]["source"] == llama
    card = (folder / "huggingface/README.md").read_text()
    assert metadata["initial_weights"]["digest"] in card and "trained elsewhere" in card


def test_release_of_a_release_keeps_the_models_name(llama: str, released: Path) -> None:
    for source in (released, released / "huggingface"):
        assert release_external_weights(str(source), ["huggingface"], force=True) == Path("releases/small")


TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_release_of_a_chat_model_keeps_its_chat_template(llama: str, place: str) -> None:
    path = Path(llama) / place
    if path.suffix == ".json":
        write_json(path, read_json(path) | {"chat_template": TEMPLATE})
    else:
        path.write_text(TEMPLATE)
    write_json(Path(llama) / "generation_config.json", {"eos_token_id": [2, 5], "repetition_penalty": 1.7})
    folder = release_external_weights(llama, ["huggingface", "gguf"])
    said = AutoTokenizer.from_pretrained(folder / "huggingface").apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
    assert said == "[user] hello\n"
    settings = read_json(folder / "huggingface/generation_config.json")
    assert settings == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 2, "repetition_penalty": 1.7}
    fields = GGUFReader(folder / "gguf/other-F16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert failed_checks(folder) == []


def with_another_head(llama: str) -> None:
    """A config.json that ties the embeddings, over weights that are not tied."""
    path = Path(llama) / "model.safetensors"
    tensors = load_file(path)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(2)) / 5
    save_file(tensors | {"lm_head.weight": head.bfloat16()}, path, {"format": "pt"})
    write_json(Path(llama) / "config.json", read_json(Path(llama) / "config.json") | {"tie_word_embeddings": True})


def rows_of(checks: list[Check], subject: str) -> dict[str, bool]:
    return {check.what: check.passed for check in checks if check.subject == subject}


def test_untied_weights_with_a_tied_config_are_released_as_transformers_computes_them(llama: str) -> None:
    with_another_head(llama)
    checks = verify_release(release_external_weights(llama, ["huggingface"]))
    assert rows_of(checks, "source") == {"greedy": True, "nats per token": True}
    assert read_json(Path("releases/other/huggingface/config.json"))["tie_word_embeddings"] is False


def ignore_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust config.json about tied embeddings, which makes our reader wrong."""
    monkeypatch.setattr(HuggingFaceLlama, "_has_own_head", lambda _: False)


def test_weights_that_transformers_computes_differently_are_not_released(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_another_head(llama)
    ignore_another_head(monkeypatch)
    assert cli.main(["--quiet", "release", llama, "--formats", "huggingface"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama: {llama}: ") and "different outputs" in line
    assert not Path("releases/other").exists()


def test_verification_compares_with_the_unchanged_source(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_another_head(llama)
    with monkeypatch.context() as patch:
        ignore_another_head(patch)
        patch.setattr(convert, "_compare_with_transformers", lambda *_: None)
        folder = release_external_weights(llama, ["huggingface"])
        checks = verify_release(folder)
    assert set(rows_of(checks, "huggingface").values()) == {True}  # its reference comes from the same reader
    assert rows_of(checks, "source") == {"greedy": False, "nats per token": False}
    config = Path(llama) / "config.json"
    config.write_text(config.read_text() + "\n")
    assert rows_of(verify_release(folder), "source") == {}
    config.unlink()
    assert rows_of(verify_release(folder), "source") == {}


@pytest.mark.parametrize(
    ("how", "status", "keyword"),
    [
        (str(int(signal.SIGSEGV)), 1, "transformers crashed (SIGSEGV)"),
        ("error", 2, "transformers cannot run this model"),
    ],
)
def test_source_on_which_transformers_fails_is_not_released(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, status: int, keyword: str
) -> None:
    plant_crash(monkeypatch, "transformers-source", how)
    assert cli.main(["--quiet", "release", llama, "--formats", "huggingface"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama: {llama}: ") and keyword in line
    assert not Path("releases/other").exists()


def test_special_tokens_beyond_the_rows_are_in_no_format(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = read_json(Path(llama) / "tokenizer.json")
    size = add_tokens(Path(llama), "<pad>", "<mask>")
    write_json(Path(llama) / "config.json", read_json(Path(llama) / "config.json") | {"pad_token_id": size})
    settings = {"eos_token_id": [2, size + 1], "pad_token_id": size, "temperature": 0.7}
    write_json(Path(llama) / "generation_config.json", settings)
    folder = release_external_weights(llama)
    checks = verify_release(folder)
    assert [check for check in checks if not check.passed] == []
    assert rows_of(checks, "gguf Q8_0")["tokens"] and rows_of(checks, "ctranslate2 int8")["tokens"]
    for name in ("huggingface", "ctranslate2/int8"):
        assert read_json(folder / name / "tokenizer.json")["added_tokens"] == tokenizer["added_tokens"]
    assert len(AutoTokenizer.from_pretrained(folder / "huggingface")) == size
    kept = read_json(folder / "huggingface/generation_config.json")
    assert kept == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2, "temperature": 0.7}
    assert "<pad>" in capsys.readouterr().err


def test_command_releases_a_llama_and_checks_its_options(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["release", llama, "--formats", "huggingface"]
    Path("releases/other").mkdir(parents=True)
    assert cli.main(command) == 2
    assert "releases/other: exists and is not a release" in capsys.readouterr().err
    Path("releases/other").rmdir()
    assert cli.main(command) == 0
    assert "release: releases/other" in capsys.readouterr().out
    for more, keyword in (
        ([], "releases/other: already released"),
        (["--force", "--step", "3"], "no checkpoint to select"),
        (["--force", "--public"], "--push"),
    ):
        assert cli.main([*command, *more]) == 2
        assert keyword in capsys.readouterr().err
