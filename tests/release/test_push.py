"""Pushes to a local stand-in of the hub."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.conftest import flip_a_bit
from tests.release.hub import TOKEN, USER, Hub, Repository, running_hub

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.release.metadata import hash_files
from tinyllama.release.push import push_release


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in as HF_ENDPOINT, and its user's token; large files use plain LFS, not Xet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        yield hub


@pytest.fixture
def complete(released: Path, tmp_path: Path) -> Path:
    """A release that the test may change, with files in the other formats' folders and scores."""
    folder = Path(shutil.copytree(released, tmp_path / "step-00000040"))
    for name in ("gguf/small-Q8_0.gguf", "ctranslate2/model.bin", "ctranslate2/config.json", "evaluation.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 300)
    return update_file_list(folder)


def update_file_list(folder: Path) -> Path:
    facts = read_json(folder / "release.json")
    (folder / "release.json").unlink()
    write_json(folder / "release.json", facts | {"files": hash_files(folder)})
    return folder


def expected(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix().removeprefix("huggingface/"): path.read_bytes() for path in paths}


def push_error(folder: Path, name: str) -> str:
    with pytest.raises(InputError) as error:
        push_release(folder, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_push_is_one_commit_of_exactly_the_releases_bytes(hub: Hub, complete: Path) -> None:
    assert push_release(complete, "small") == f"{hub.url}/{USER}/small"
    repository = hub.repositories[f"{USER}/small"]
    assert repository.files == expected(complete)
    assert {"config.json", "model.safetensors", "gguf/small-Q8_0.gguf", "release.json"} <= repository.files.keys()
    assert repository.commits == ["small, step 40, 15,360 tokens"]


def test_release_of_external_weights_has_no_step_in_its_commit_message(hub: Hub, complete: Path) -> None:
    facts = read_json(complete / "release.json")
    write_json(complete / "release.json", facts | {"name": "their-llama", "step": None, "tokens": None})
    push_release(complete, "small")
    assert hub.repositories[f"{USER}/small"].commits == ["their-llama"]


@pytest.mark.parametrize(("public", "visibility"), [(False, "private"), (True, "public")])
def test_new_repository_is_private_by_default(hub: Hub, released: Path, public: bool, visibility: str) -> None:
    push_release(released, "guild/small", public=public)
    assert hub.repositories["guild/small"].visibility == visibility


@pytest.mark.parametrize("visibility", ["public", "private"])
def test_existing_repository_keeps_its_visibility_and_other_files(hub: Hub, released: Path, visibility: str) -> None:
    hub.repositories["guild/small"] = Repository(visibility, {"LICENSE": b"theirs"}, ["initial commit"])
    push_release(released, "guild/small", public=visibility == "private")
    repository = hub.repositories["guild/small"]
    assert repository.visibility == visibility
    assert repository.files == expected(released) | {"LICENSE": b"theirs"}


def test_stale_files_of_the_last_release_are_deleted(hub: Hub, complete: Path) -> None:
    shards = complete / "huggingface/model-00001-of-00002.safetensors"
    shards.write_bytes(b"of the last release")
    push_release(update_file_list(complete), "small")
    hub.repositories[f"{USER}/small"].files["LICENSE"] = b"theirs"
    shards.unlink()
    (complete / "evaluation.json").unlink()
    push_release(update_file_list(complete), "small")
    repository = hub.repositories[f"{USER}/small"]
    assert repository.files == expected(complete) | {"LICENSE": b"theirs"}
    assert len(repository.commits) == 2


def test_pushing_again_changes_nothing(hub: Hub, released: Path) -> None:
    url = push_release(released, "small")
    uploaded = [request for request in hub.requests if request.startswith("PUT")]
    assert push_release(released, f"{USER}/small") == url
    assert len(hub.repositories[f"{USER}/small"].commits) == 1
    assert [request for request in hub.requests if request.startswith("PUT")] == uploaded


@pytest.mark.slow
def test_release_without_push_sends_no_request(hub: Hub, run: Path) -> None:
    assert cli.main(["release", str(run)]) == 0
    assert hub.requests == []


@pytest.mark.slow
def test_command_releases_and_pushes_a_run_and_pushes_an_existing_release(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["release", str(run), "--push", "guild/small"]) == 0
    folder = run / "releases/step-00000040"
    assert cli.main(["release", str(folder), "--push", "small", "--public"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"release: {folder}", f"pushed: {hub.url}/guild/small", f"release: {folder}", f"pushed: {hub.url}/{USER}/small"
    ]  # fmt: skip
    assert cli.main(["release", str(run), "--push", "guild/small"]) == 0  # released already
    assert capsys.readouterr().out.splitlines() == [f"release: {folder}", f"pushed: {hub.url}/guild/small"]
    assert cli.main(["release", str(run), "--push", "guild/small", "--average", "2"]) == 2  # not the existing release
    assert "already released" in capsys.readouterr().err
    assert [hub.repositories[name].visibility for name in ("guild/small", f"{USER}/small")] == ["private", "public"]
    assert [set(there.files) for there in hub.repositories.values()] == [expected(folder).keys()] * 2


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (
            lambda folder: flip_a_bit(folder / "huggingface/model.safetensors"),
            "/huggingface/model.safetensors: differs",
        ),
        (lambda folder: (folder / "huggingface/tokenizer.json").unlink(), "/huggingface/tokenizer.json: missing"),
        (lambda folder: (folder / "huggingface/notes.txt").touch(), "/huggingface/notes.txt: not in release.json"),
        (lambda folder: (folder / "release.json").unlink(), ": no release"),
        (
            lambda folder: (folder / "release.json").write_text('{"version": "1.0"}'),
            ": no release",
        ),  # another program's
    ],
)
def test_damaged_release_is_not_pushed(hub: Hub, complete: Path, damage: Callable[[Path], None], place: str) -> None:
    damage(complete)
    assert push_error(complete, "small").startswith(f"{complete}{place}")
    assert hub.requests == []


def use_wrong_token(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    patch.setenv("HF_TOKEN", "hf_wrong")
    return "refuses this token"


def use_no_token(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    patch.delenv("HF_TOKEN")
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    return "set HF_TOKEN"


def stop_the_hub(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    with running_hub() as stopped:
        patch.setenv("HF_ENDPOINT", stopped.url)
    return f"{stopped.url}: cannot be reached"


def go_offline(hub: Hub, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "HF_HUB_OFFLINE"


@pytest.mark.parametrize("name", ["small", "guild/small"])
@pytest.mark.parametrize("prepare", [use_wrong_token, use_no_token, stop_the_hub, go_offline])
def test_unusable_token_or_hub_is_an_error(
    hub: Hub, released: Path, name: str, prepare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(hub, monkeypatch)
    assert expected in push_error(released, name)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("strangers/small", "403"), *((name, "not a repository name") for name in ("a/b/c", "small model", "--", ""))],
)
def test_invalid_repository_is_an_error(hub: Hub, released: Path, name: str, keyword: str) -> None:
    assert keyword in push_error(released, name)
    assert not hub.repositories


def test_refused_upload_is_an_error_without_a_commit(hub: Hub, released: Path) -> None:
    hub.refused_uploads = 413
    error = push_error(released, "small")
    assert "413" in error and "push again" not in error
    assert hub.repositories[f"{USER}/small"].files == {}
