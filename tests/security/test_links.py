"""A run, store or release from elsewhere with symbolic links changes nothing outside its folder."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.tracking.run_files import new_run, write_steps

from tinyllama import cli
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import reject_symlinks, write_json
from tinyllama.release.card import update_card, update_cards
from tinyllama.runs.run_dir import ReleaseDir, ReleasesDir
from tinyllama.tracking.trackers import try_acquire_sink
from tinyllama.tracking.trackio_sink import import_trackio


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    folder = tmp_path / "victim"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/precious").write_text("precious")
    (folder / "README.md").write_text("precious")
    return folder


def test_unfinished_store_with_link_deletes_nothing_outside(
    small: Path, tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    (store / ".work").mkdir(parents=True)
    (store / "modules").symlink_to(victim)
    command = ["--quiet", "prepare", str(small / "recipe.yaml"), "--data.store", str(store)]
    assert cli.main(command) == 2
    assert f"{store}/modules: is a symbolic link" in capsys.readouterr().err
    assert (victim / "inner/precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["releases", "trackers", "checkpoints", "tokenizer", "releases/step-00000010"])
def test_run_with_link_is_not_trained(
    small: Path,
    tmp_path: Path,
    victim: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    run = new_run(tmp_path)[0].path
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--quiet", "train", str(small / "recipe.yaml"), "--train.compile", "false"]) == 2
    assert f"runs/small/{name}: is a symbolic link" in capsys.readouterr().err
    assert sorted(path.name for path in victim.rglob("*")) == ["README.md", "inner", "precious"]


def test_checkpoints_may_link_to_unused_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match="one/checkpoints: is a symbolic link"):
        reject_symlinks(tmp_path / "one")
    reject_symlinks(tmp_path / "one", is_run=True)
    (tmp_path / "disk/step-00000010").mkdir()
    reject_symlinks(tmp_path / "one", is_run=True)
    with pytest.raises(InputError, match="two/checkpoints: is a symbolic link"):
        reject_symlinks(tmp_path / "two", is_run=True)


def test_run_with_link_is_not_tracked(tmp_path: Path, victim: Path) -> None:
    run_dir, log = new_run(tmp_path)
    run = run_dir.path
    write_steps(log, 1, 3)
    (run / "trackers").symlink_to(victim)
    with ExitStack() as locks, pytest.raises(InputError, match="trackers: is a symbolic link"):
        try_acquire_sink(run_dir, "trackio", locks)
    assert sorted(path.name for path in victim.iterdir()) == ["README.md", "inner"]


def test_linked_releases_and_page_are_not_written(tmp_path: Path, victim: Path) -> None:
    run_dir, log = new_run(tmp_path)
    run = run_dir.path
    write_steps(log, 1, 3)
    (run / "releases").symlink_to(victim)
    with pytest.raises(InputError, match="releases: is a symbolic link"):
        update_cards(ReleasesDir(run / "releases"))
    write_json(victim / "inner/release.json", {"files": {}, "step": 3})
    with pytest.raises(InputError, match="releases: is a symbolic link"):
        update_card(run / "releases/inner")
    (run.parent / ".trackio").symlink_to(victim)
    with pytest.raises(InputError, match=r"\.trackio: is a symbolic link"):
        import_trackio(run_dir)
    assert sorted(path.name for path in victim.iterdir()) == ["README.md", "inner"]


@pytest.mark.parametrize("name", ["tinyllama.lock", "tinyllama.db", "media/tinyllama"])
def test_link_in_folder_of_trackio_is_refused(tmp_path: Path, victim: Path, name: str) -> None:
    run_dir, _ = new_run(tmp_path)
    path = tmp_path / "runs/.trackio" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(victim / "README.md")
    with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
        import_trackio(run_dir)


@pytest.mark.parametrize("name", ["debug.log", "run-1", "run-1/logs/events.jsonl", "x/wandb/run-0/logs/debug-core.log"])
def test_only_logs_of_wandb_may_be_links(tmp_path: Path, victim: Path, name: str) -> None:
    log = tmp_path / "run/wandb/run-0/logs/debug-core.log"
    log.parent.mkdir(parents=True)
    log.symlink_to(victim / "README.md")
    reject_symlinks(tmp_path / "run", is_run=True)
    path = tmp_path / "run/wandb" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(victim)
    with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
        reject_symlinks(tmp_path / "run", is_run=True)


def test_pipe_in_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    os.mkfifo(tmp_path / "tensorboard/events.out.tfevents.1")
    with pytest.raises(InputError, match=r"tfevents\.1: not a regular file"):
        reject_symlinks(tmp_path)


def test_card_of_release_with_link_is_not_written(tmp_path: Path, victim: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    (release / "huggingface").symlink_to(victim)
    write_json(release / "release.json", {"name": "x", "files": {}, "step": None})
    with pytest.raises(InputError, match="huggingface: is a symbolic link"):
        update_card(release)
    assert (victim / "README.md").read_text() == "precious"


@pytest.mark.parametrize("name", ["../victim/README.md", "/etc/passwd", "gguf/../../x"])
def test_release_with_file_outside_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "release.json", {"files": {name: {"bytes": 1, "sha256": ""}}})
    with pytest.raises(InputError, match="a file outside its folder"):
        ReleaseDir(tmp_path).metadata()


@pytest.mark.parametrize("place", ["source", "split", "shard"])
def test_store_with_file_outside_folder_is_refused(tmp_path: Path, place: str) -> None:
    names = {"source": "own", "split": "train", "shard": "00000.tokens"} | {place: "../victim"}
    folder = tmp_path / "store" / names["source"] / names["split"]
    shards = [{"file": names["shard"], "tokens": 1, "documents": 1}]
    write_json(folder / "manifest.json", {"shards": shards})
    sources: dict[str, Any] = {names["source"]: {"splits": {names["split"]: {}}}}
    write_json(tmp_path / "store/manifest.json", {"format_version": 3, "dtype": "<u2", "sources": sources})
    with pytest.raises(InputError, match=r"names '\.\./victim', which is not a file of the store"):
        TokenStore.open(tmp_path / "store")


def test_renamed_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, log = new_run(tmp_path)
    run = run_dir.path
    write_steps(log, 1, 3)
    for name in ("step-00000010.bak", "best"):
        write_json(run / "checkpoints" / name / "commit.json", {"sha256": {}})
    assert run_dir.checkpoints() == []
    assert cli.main(["release", str(run / "checkpoints/best")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoints/best: not a checkpoint's name" in line
