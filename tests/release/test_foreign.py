"""Any Hugging Face Llama becomes a release, whose card tells where its weights came from."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.evaluate import evaluate
from tinyllama.files import read_json, write_json
from tinyllama.release import update_card
from tinyllama.release.foreign import release_foreign


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
    write_json(Path(llama) / "generation_config.json", {"eos_token_id": [2, 5]})
    folder = release_foreign(llama, ["huggingface", "gguf"])
    said = AutoTokenizer.from_pretrained(folder / "huggingface").apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
    assert said == "[user] hello\n"
    assert read_json(folder / "huggingface/generation_config.json") == {"eos_token_id": [2, 5]}
    fields = GGUFReader(folder / "gguf/other-F16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE


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
        (["--force", "--step", "3"], "others' weights have no steps"),
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
