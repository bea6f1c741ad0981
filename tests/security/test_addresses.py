"""Addresses in recipes and releases: local paths, URLs of known protocols, plain names."""

import shutil
from pathlib import Path

import pytest
import yaml
from tests.conftest import small_recipe
from tests.release.formats import SHAPE, random_model

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.prepare.files import find_files
from tinyllama.recipe import Recipe
from tinyllama.release.convert import release_external_weights
from tinyllama.release.release import write_hugging_face
from tinyllama.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "path",
    [
        "reference::file:///x.json",
        "simplecache::https://example.org/x.jsonl",
        "github://org:repo@/x",
        "zip://x.jsonl::file:///y.zip",
        "git://x",
        "dask://x",
    ],
)
def test_source_with_unsafe_protocol_or_chain_is_refused(small: Path, tmp_path: Path, path: str) -> None:
    fields = small_recipe(small)
    fields["data"]["sources"] = {"own": {"format": "jsonl", "path": path, "weight": 1}}
    with pytest.raises(InputError, match=r"data\.sources\.own\.path: .*is not a supported URL"):
        Recipe.load(written(tmp_path, fields))
    with pytest.raises(InputError, match="is not a supported URL"):
        find_files(path, lambda name: True)


@pytest.mark.parametrize(
    "slurm",
    [
        {"partition": "x", "arguments": {"comment": "x\ntouch /tmp/run"}},
        {"partition": "x", "arguments": {"comment": "x --output=/home/victim"}},
        {"partition": "x", "arguments": {"output": "/home/victim"}},
        {"partition": "x", "arguments": {"wrap": "touch"}},
        {"partition": "x\ntouch /tmp/run"},
        {"partition": "x", "time": "1:00\ntouch /tmp/run"},
    ],
)
def test_recipe_cannot_inject_into_batch_script(small: Path, tmp_path: Path, slurm: dict[str, object]) -> None:
    fields = small_recipe(small)
    fields["data"] |= {"executor": "slurm", "slurm": slurm}
    with pytest.raises(InputError, match=r"hostile\.yaml: data\.slurm"):
        Recipe.load(written(tmp_path, fields))


def test_link_out_of_model_folder_is_not_released(stranger: Path) -> None:
    source = stranger / "huggingface"
    (stranger.parent / "secret").write_text("secret")
    (source / "chat_template.jinja").symlink_to(stranger.parent / "secret")
    with pytest.raises(InputError, match=r"chat_template\.jinja: is a link to .*secret, outside its folder"):
        release_external_weights(str(source), ["huggingface"])


def written(folder: Path, fields: dict[str, object]) -> Path:
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture
def stranger(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a release from elsewhere, with another folder next to the working folder."""
    tokenizer = Tokenizer.load(small / "tokenizer")
    write_hugging_face(tmp_path / "stranger/huggingface", random_model(tokenizer.vocab_size, SHAPE), tokenizer)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious").write_text("precious")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "stranger"


@pytest.mark.parametrize("name", ["../../victim", "..", "/tmp/victim", "a/b", "", 3, None, ["x"], "a\x1b[2J", "ok\n"])
def test_name_in_release_is_not_a_path(stranger: Path, name: object) -> None:
    write_json(stranger / "release.json", {"name": name})
    with pytest.raises(InputError, match=r"release\.json: .* is not a valid model name"):
        release_external_weights(str(stranger), ["huggingface"], force=True)
    assert (stranger.parent / "victim/precious").read_text() == "precious"
    assert not any((stranger.parent / "work").rglob("*"))


@pytest.mark.parametrize("files", [5, None, ["notes.txt"], {"../../victim/precious": {}}])
def test_force_keeps_folder_with_invalid_files(stranger: Path, files: object) -> None:
    write_json(Path("releases/stranger/release.json"), {"name": "stranger", "files": files})
    with pytest.raises(InputError, match="releases/stranger"):
        release_external_weights(str(stranger), ["huggingface"], force=True)
    assert read_json(Path("releases/stranger/release.json"))["files"] == files


@pytest.mark.slow
def test_force_removes_only_files_of_release(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["release", str(stranger), "--formats", "huggingface", "--force"]
    write_json(stranger / "release.json", {"name": "own"})
    target = Path("releases/own")
    shutil.copytree(stranger.parent / "victim", target)
    assert cli.main(command) == 2
    assert "not a release" in capsys.readouterr().err
    assert (target / "precious").read_text() == "precious"
    shutil.rmtree(target)
    target.symlink_to(stranger.parent / "victim")
    assert cli.main(command) == 2
    target.unlink()
    assert cli.main(command) == 0
    assert cli.main(command) == 0  # it replaces only files that it wrote
    (target / "notes.txt").write_text("mine")
    assert cli.main(command) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert read_json(target / "release.json")["name"] == "own"


def test_index_with_file_outside_folder_is_refused(stranger: Path) -> None:
    folder = stranger / "huggingface"
    (folder / "model.safetensors").rename(stranger / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "../model.safetensors"}})
    with pytest.raises(InputError, match="names a file outside its folder"):
        release_external_weights(str(folder), ["huggingface"])
