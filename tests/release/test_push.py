"""A push is one commit of exactly the release, private unless told otherwise; a stand-in of the hub takes it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tests.conftest import flip_a_bit
from tests.release.hub import TOKEN, USER, Hub, Repository, running_hub

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.release.lineage import hash_files
from tinyllama.release.push import push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, which HF_ENDPOINT names, and its user's token; large files come by plain LFS, not by Xet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        yield hub


@pytest.fixture
def whole(released: Path, tmp_path: Path) -> Path:
    """A release of a test's own, with files in the other formats' folders and scores."""
    folder = Path(shutil.copytree(released, tmp_path / "step-00000040"))
    for name in ("gguf/small-Q8_0.gguf", "ctranslate2/model.bin", "ctranslate2/config.json", "evaluation.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 300)
    return listed_anew(folder)


def listed_anew(folder: Path) -> Path:
    facts = read_json(folder / "release.json")
    (folder / "release.json").unlink()
    write_json(folder / "release.json", facts | {"files": hash_files(folder)})
    return folder


def expected(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix().removeprefix("huggingface/"): path.read_bytes() for path in paths}


def refused(folder: Path, name: str) -> str:
    with pytest.raises(InputError) as error:
        push(folder, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_byte_arrives_in_one_commit_that_says_what_it_is(hub: Hub, whole: Path) -> None:
    assert push(whole, "small") == f"{hub.url}/{USER}/small"
    repository = hub.repositories[f"{USER}/small"]
    assert repository.files == expected(whole)
    assert {"config.json", "model.safetensors", "gguf/small-Q8_0.gguf", "release.json"} <= repository.files.keys()
    assert repository.commits == ["small, step 40, 15,360 tokens"]


def test_a_release_of_others_weights_has_no_step_to_say(hub: Hub, whole: Path) -> None:
    facts = read_json(whole / "release.json")
    write_json(whole / "release.json", facts | {"name": "their-llama", "step": None, "tokens": None})
    push(whole, "small")
    assert hub.repositories[f"{USER}/small"].commits == ["their-llama"]


@pytest.mark.parametrize(("public", "visibility"), [(False, "private"), (True, "public")])
def test_a_new_repository_is_private_unless_told_otherwise(
    hub: Hub, released: Path, public: bool, visibility: str
) -> None:
    push(released, "guild/small", public=public)
    assert hub.repositories["guild/small"].visibility == visibility


@pytest.mark.parametrize("visibility", ["public", "private"])
def test_a_repository_that_is_there_stays_as_visible_as_it_is_and_keeps_others_files(
    hub: Hub, released: Path, visibility: str
) -> None:
    hub.repositories["guild/small"] = Repository(visibility, {"LICENSE": b"theirs"}, ["initial commit"])
    push(released, "guild/small", public=visibility == "private")
    repository = hub.repositories["guild/small"]
    assert repository.visibility == visibility
    assert repository.files == expected(released) | {"LICENSE": b"theirs"}


def test_what_the_last_release_had_and_this_one_lacks_is_deleted(hub: Hub, whole: Path) -> None:
    shards = whole / "huggingface/model-00001-of-00002.safetensors"
    shards.write_bytes(b"of the last release")
    push(listed_anew(whole), "small")
    hub.repositories[f"{USER}/small"].files["LICENSE"] = b"theirs"
    shards.unlink()
    (whole / "evaluation.json").unlink()
    push(listed_anew(whole), "small")
    repository = hub.repositories[f"{USER}/small"]
    assert repository.files == expected(whole) | {"LICENSE": b"theirs"}
    assert len(repository.commits) == 2


def test_the_same_release_again_changes_nothing(hub: Hub, released: Path) -> None:
    url = push(released, "small")
    uploaded = [request for request in hub.requests if request.startswith("PUT")]
    assert push(released, f"{USER}/small") == url
    assert len(hub.repositories[f"{USER}/small"].commits) == 1
    assert [request for request in hub.requests if request.startswith("PUT")] == uploaded


def test_what_was_pushed_loads_from_the_repositorys_root(hub: Hub, released: Path, tmp_path: Path) -> None:
    push(released, "small")
    for name, data in hub.repositories[f"{USER}/small"].files.items():
        (tmp_path / "downloaded" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloaded" / name).write_bytes(data)
    ours, theirs = load_model(released).state_dict(), load_model(tmp_path / "downloaded").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_nothing_is_requested_without_the_flag(hub: Hub, run: Path) -> None:
    assert cli.main(["release", str(run)]) == 0
    assert hub.requests == []


@pytest.mark.slow
def test_the_command_pushes_a_run_as_it_releases_it_and_a_release_as_it_is(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["release", str(run), "--push", "guild/small"]) == 0
    folder = run / "releases/step-00000040"
    assert cli.main(["release", str(folder), "--push", "small", "--public"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"release: {folder}", f"pushed: {hub.url}/guild/small", f"pushed: {hub.url}/{USER}/small"
    ]  # fmt: skip
    assert cli.main(["release", str(run), "--push", "guild/small"]) == 0  # released by now, and not released again
    assert capsys.readouterr().out.splitlines() == [f"pushed: {hub.url}/guild/small"]
    assert cli.main(["release", str(run), "--push", "guild/small", "--average", "2"]) == 2  # another release than that
    assert "already released" in capsys.readouterr().err
    assert [hub.repositories[name].visibility for name in ("guild/small", f"{USER}/small")] == ["private", "public"]
    assert [set(there.files) for there in hub.repositories.values()] == [expected(folder).keys()] * 2


def flip(folder: Path) -> str:
    path = folder / "huggingface/model.safetensors"
    flip_a_bit(path)
    return f"{path}: not as release.json has it"


def lose(folder: Path) -> str:
    (folder / "huggingface/tokenizer.json").unlink()
    return f"{folder / 'huggingface/tokenizer.json'}: missing"


def add(folder: Path) -> str:
    (folder / "huggingface/notes.txt").write_text("mine")
    return f"{folder / 'huggingface/notes.txt'}: not in release.json"


def no_release(folder: Path) -> str:
    (folder / "release.json").unlink()
    return f"{folder}: no release here"


def another_programs(folder: Path) -> str:
    (folder / "release.json").write_text('{"version": "1.0"}')
    return f"{folder}: no release here"


@pytest.mark.parametrize("damage", [flip, lose, add, no_release, another_programs])
def test_what_is_no_whole_release_is_refused_by_the_files_name_and_nothing_is_sent(
    hub: Hub, whole: Path, damage: Callable[[Path], str]
) -> None:
    wanted = damage(whole)
    assert refused(whole, "small").startswith(wanted)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["small", "guild/small"])
def test_a_wrong_token_is_one_line(hub: Hub, released: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused(released, name) == (
        f"{name}: {hub.url} refuses this token; set HF_TOKEN to a token with write access"
    )
    assert not hub.repositories


@pytest.mark.parametrize("name", ["small", "guild/small"])
def test_no_token_is_one_line(
    hub: Hub, released: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "not logged in to the hub; set HF_TOKEN" in refused(released, name)


def test_an_owner_that_is_not_the_users_is_one_line(hub: Hub, released: Path) -> None:
    said = refused(released, "strangers/small")
    assert said.startswith(f"strangers/small: {hub.url} does not allow this token to write there (403)")


@pytest.mark.parametrize("name", ["a/b/c", "small model", "--", ""])
def test_what_is_no_name_is_one_line_and_makes_nothing(hub: Hub, released: Path, name: str) -> None:
    assert refused(released, name).startswith(f"{name!r}: not a repository name")
    assert not hub.repositories


@pytest.mark.parametrize("name", ["small", "guild/small"])
def test_a_hub_that_cannot_be_reached_is_one_line(
    hub: Hub, released: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    assert refused(released, name).startswith(f"{gone.url}: cannot be reached")


def test_offline_mode_is_one_line(hub: Hub, released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(released, "small") == "small: HF_HUB_OFFLINE is set; unset it to push"


def test_an_upload_that_the_hub_refuses_is_one_line_and_no_commit(hub: Hub, released: Path) -> None:
    hub.refused_uploads = 413
    said = refused(released, "small")
    assert "413" in said
    assert "push again" not in said
    assert hub.repositories[f"{USER}/small"].files == {}
