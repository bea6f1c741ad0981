"""Any Hugging Face Llama becomes a release, whose card tells where its weights came from."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tests.release.test_isolation import plant
from tests.vocabularies import add_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.evaluate.evaluation import evaluate
from tinyllama.files import read_json, write_json
from tinyllama.loading import HuggingFaceLlama
from tinyllama.release import convert, update_card
from tinyllama.release.convert import release_foreign
from tinyllama.release.verify import Check, verify

pytestmark = pytest.mark.slow


@pytest.fixture
def llama(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released / "huggingface", tmp_path / "models/other")
    return "models/other"


def test_a_hugging_face_llama_is_released_with_its_weights_and_where_they_came_from(llama: str) -> None:
    folder = release_foreign(llama, ["huggingface"])
    assert folder == Path("releases/other")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).state_dict()
        for place in (llama, folder / "huggingface")
    )
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    facts = read_json(folder / "release.json")
    assert facts["initial_weights"]["source"] == llama
    card = (folder / "huggingface/README.md").read_text()
    assert facts["initial_weights"]["digest"] in card and "trained elsewhere" in card


def test_a_release_is_released_again_under_the_models_name(llama: str, released: Path) -> None:
    for source in (released, released / "huggingface"):
        assert release_foreign(str(source), ["huggingface"], force=True) == Path("releases/small")


TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_model_can_still_be_spoken_to(llama: str, place: str) -> None:
    path = Path(llama) / place
    if path.suffix == ".json":
        write_json(path, read_json(path) | {"chat_template": TEMPLATE})
    else:
        path.write_text(TEMPLATE)
    write_json(Path(llama) / "generation_config.json", {"eos_token_id": [2, 5], "repetition_penalty": 1.7})
    folder = release_foreign(llama, ["huggingface", "gguf"])
    said = AutoTokenizer.from_pretrained(folder / "huggingface").apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
    assert said == "[user] hello\n"
    settings = read_json(folder / "huggingface/generation_config.json")
    assert settings == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 2, "repetition_penalty": 1.7}
    fields = GGUFReader(folder / "gguf/other-F16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE


def test_a_chat_model_is_verified_whatever_its_generation_config_asks_for(llama: str) -> None:
    write_json(Path(llama) / "generation_config.json", {"eos_token_id": [2, 5], "repetition_penalty": 1.7})
    checks = verify(release_foreign(llama, ["huggingface"]))
    assert [check for check in checks if not check.passed] == []


def with_another_head(llama: str) -> None:
    """A config.json that ties the embeddings, over weights that are not tied."""
    path = Path(llama) / "model.safetensors"
    tensors = load_file(path)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(2)) / 5
    save_file(tensors | {"lm_head.weight": head.bfloat16()}, path, {"format": "pt"})
    write_json(Path(llama) / "config.json", read_json(Path(llama) / "config.json") | {"tie_word_embeddings": True})


def rows_of(checks: list[Check], subject: str) -> dict[str, bool]:
    return {check.what: check.passed for check in checks if check.subject == subject}


def test_weights_that_are_not_tied_as_config_says_are_released_as_transformers_computes_them(llama: str) -> None:
    with_another_head(llama)
    checks = verify(release_foreign(llama, ["huggingface"]))
    assert [check for check in checks if not check.passed] == []
    assert rows_of(checks, "source") == {"greedy": True, "nats a token": True}
    assert read_json(Path("releases/other/huggingface/config.json"))["tie_word_embeddings"] is False


def read_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe config.json, as this project's reader once did."""
    monkeypatch.setattr(HuggingFaceLlama, "_has_own_head", lambda _: False)


def test_weights_that_transformers_computes_otherwise_are_not_released(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_another_head(llama)
    read_wrongly(monkeypatch)
    assert cli.main(["--quiet", "release", llama, "--formats", "huggingface"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama: {llama}: transformers disagrees")
    assert not Path("releases/other").exists()


def test_verify_compares_with_the_source_while_it_is_there_unchanged(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_another_head(llama)
    with monkeypatch.context() as patch:
        read_wrongly(patch)
        patch.setattr(convert, "_compare_with_transformers", lambda *_: None)
        folder = release_foreign(llama, ["huggingface"])
        checks = verify(folder)
    assert set(rows_of(checks, "huggingface").values()) == {True}  # its reference comes from the same reader
    assert rows_of(checks, "source") == {"greedy": False, "nats a token": False}
    config = Path(llama) / "config.json"
    config.write_text(config.read_text() + "\n")
    assert rows_of(verify(folder), "source") == {}
    config.unlink()
    assert rows_of(verify(folder), "source") == {}


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        (str(int(signal.SIGSEGV)), 1, "not compared with transformers: transformers crashed (SIGSEGV)"),
        ("error", 2, "transformers does not run it"),
    ],
)
def test_a_source_that_transformers_crashes_on_is_not_released(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str, status: int, said: str
) -> None:
    plant(monkeypatch, "transformers-source", how)
    assert cli.main(["--quiet", "release", llama, "--formats", "huggingface"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama: {llama}: ") and said in line
    assert not Path("releases/other").exists()


def test_a_source_that_transformers_does_not_run_is_not_released(llama: str) -> None:
    write_json(Path(llama) / "config.json", read_json(Path(llama) / "config.json") | {"num_hidden_layers": 2.0})
    with pytest.raises(InputError, match="transformers does not run it"):
        release_foreign(llama, ["huggingface"])
    assert not Path("releases/other").exists()


def test_special_tokens_beyond_the_rows_are_in_no_format_and_llama_cpp_loads_it(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_json(Path(llama) / "tokenizer.json")
    size = add_tokens(Path(llama), "<pad>", "<mask>")
    write_json(Path(llama) / "config.json", read_json(Path(llama) / "config.json") | {"pad_token_id": size})
    settings = {"eos_token_id": [2, size + 1], "pad_token_id": size, "temperature": 0.7}
    write_json(Path(llama) / "generation_config.json", settings)
    folder = release_foreign(llama)
    checks = verify(folder)
    assert [check for check in checks if not check.passed] == []
    assert rows_of(checks, "gguf Q8_0")["tokens"] and rows_of(checks, "ctranslate2 int8")["tokens"]
    for name in ("huggingface", "ctranslate2/int8"):
        assert read_json(folder / name / "tokenizer.json")["added_tokens"] == whole["added_tokens"]
    assert len(AutoTokenizer.from_pretrained(folder / "huggingface")) == size
    kept = read_json(folder / "huggingface/generation_config.json")
    assert kept == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2, "temperature": 0.7}
    assert "<pad>" in capsys.readouterr().err


def test_its_scores_stand_in_its_card(llama: str) -> None:
    folder = release_foreign(llama, ["huggingface"])
    evaluate(folder, ["piqa"], limit=4, precision=torch.float32).save(folder / "evaluation.json")
    card = update_card(folder).read_text()
    assert "| piqa |" in card and "Not scored yet" not in card


def test_the_command_takes_it_and_refuses_what_it_cannot_have(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["release", llama, "--formats", "huggingface"]
    assert cli.main(command) == 0
    assert "release: releases/other" in capsys.readouterr().out
    for more, said in (
        ([], "releases/other: already released; --force replaces it"),
        (["--force", "--step", "3"], "pretrained weights have no steps"),
        (["--force", "--public"], "name it with --push"),
    ):
        assert cli.main([*command, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_of_the_releases_name_is_not_called_a_release(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("releases/other").mkdir(parents=True)
    assert cli.main(["release", llama, "--formats", "huggingface"]) == 2
    assert "releases/other: in the way, and no release" in capsys.readouterr().err


def test_a_folder_that_is_no_llama_is_refused_by_what_differs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(InputError, match="model_type is 'gpt_neox'"):
        release_foreign(str(tmp_path), ["huggingface"])
