"""Files from elsewhere: forged stores, links in place of locks and logs, damaged metrics, a shared compile cache."""

import getpass
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import interrupt

from tinyllama.errors import InputError
from tinyllama.files import (
    atomic_write,
    blocking_lock,
    exclusive_lock,
    last_rows,
    open_without_following,
    read_regular_file,
    sha256_of,
    write_json,
)
from tinyllama.prepare.pipeline import build_store, store_settings
from tinyllama.prepare.tasks import plan_job
from tinyllama.processes import use_private_compile_cache
from tinyllama.recipe import Recipe
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.tracking.trackers import try_acquire_sink


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_symlinked_lock_is_refused(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(victim)
    with pytest.raises(InputError, match="run/lock: is a symbolic link"), exclusive_lock(tmp_path / "run/lock", ""):
        pass
    with pytest.raises(InputError, match="run/lock: is a symbolic link"), blocking_lock(tmp_path / "run/lock"):
        pass
    assert victim.read_text() == "precious"


def test_hard_linked_lock_keeps_file(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "lock").hardlink_to(victim)
    with exclusive_lock(tmp_path / "lock", ""):
        assert victim.read_text() == "precious"


def test_append_does_not_follow_symlink(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to(victim)
    with (
        pytest.raises(InputError, match=r"events\.jsonl: is a symbolic link"),
        open_without_following(tmp_path / "events.jsonl"),
    ):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("has_reader", [False, True])
def test_pipe_as_lock_or_log_is_refused(tmp_path: Path, has_reader: bool) -> None:
    run = RunDir(tmp_path)
    os.mkfifo(run.lock_path)
    with ExitStack() as stack:
        if has_reader:
            stack.callback(os.close, os.open(run.lock_path, os.O_RDONLY | os.O_NONBLOCK))
        for lock in (exclusive_lock(run.lock_path, ""), blocking_lock(run.lock_path)):
            with pytest.raises(InputError, match="lock: not a regular file"), lock:
                pass
    os.mkfifo(run.events_path)
    with pytest.raises(InputError, match=r"events\.jsonl: not a regular file"):
        RunLog(run).event("done", 1)
    assert last_rows(run.events_path, 100) == []
    run.tracker_lock_path("trackio").parent.mkdir()
    os.mkfifo(run.tracker_lock_path("trackio"))
    with ExitStack() as locks, pytest.raises(InputError, match=r"trackio\.lock: not a regular file"):
        try_acquire_sink(run, "trackio", locks)
    with pytest.raises(InputError, match="not a regular file"):
        sha256_of(run.events_path)


def test_sparse_files_are_not_read_whole(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("sparse.py")), str(tmp_path)]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "tokenizer.json: is larger than 256 MiB",
        "tokenizer.model: is larger than 256 MiB",
        "metrics.jsonl:4: not a row with a step",
        "metrics.jsonl:4: not a row of JSON with a step",
        "steps [1, 2, 3]",
    ]


def test_large_file_that_is_replaced_after_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, open_file = tmp_path / "large.json", os.open
    with path.open("wb") as file:
        file.truncate((1 << 28) + 1)

    def open_and_replace(*arguments: Any) -> int:
        descriptor = open_file(*arguments)
        path.unlink()
        path.write_text("{}")
        return descriptor

    monkeypatch.setattr("os.open", open_and_replace)
    with pytest.raises(InputError, match="is larger than"):
        read_regular_file(path)


def test_atomic_write_replaces_symlink_and_keeps_target(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "report.html").symlink_to(victim)
    with atomic_write(tmp_path / "report.html") as file:
        file.write(b"new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "report.html").read_bytes() == b"new"


def test_row_that_repeats_step_is_deleted_with_event(tmp_path: Path) -> None:
    log = RunLog(RunDir(tmp_path))
    steps = [1, 2, 2, 3, 4, -1, 2, 0]
    log.run.metrics_path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    log.truncate_after(3)
    assert [row["step"] for row in log.run.metrics()] == [1, 2, 3]
    (event,) = log.run.events()
    assert event["problem"].endswith("line 3, 6, 7, 8")


def test_damaged_row_after_checkpoint_is_deleted_with_event(tmp_path: Path) -> None:
    rows = [f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 6)]
    journal = RunLog(RunDir(tmp_path))
    journal.run.metrics_path.write_text("".join([*rows[:3], '{"step": 4, "lo\0ss"\n', "[]\n", rows[4]]))
    journal.truncate_after(3)
    assert [row["step"] for row in journal.run.metrics()] == [1, 2, 3]
    (event,) = journal.run.events()
    assert (event["event"], event["step"]) == ("metrics-damaged", 3)
    assert event["problem"].endswith("line 4, 5")


COMPILES = Path(__file__).with_name("compiles.py")


@pytest.mark.long
@pytest.mark.slow
def test_torch_compiles_nothing_into_shared_folder(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    folders = {"TMPDIR": str(tmp_path / "shared"), "XDG_CACHE_HOME": str(tmp_path / "own")}
    (tmp_path / "shared").mkdir()
    subprocess.run([sys.executable, str(COMPILES)], env=variables | folders, check=True, timeout=200)
    assert [*(tmp_path / "own/tinyllama/torchinductor").rglob("*.so")]
    (headers,) = (tmp_path / "shared").iterdir()  # torch keeps precompiled headers there in any case
    assert headers.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in headers.iterdir()} <= {"precompiled_headers"}


def test_headers_are_not_precompiled_in_foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (tmp_path / "other").mkdir()
    (tmp_path / f"torchinductor_{getpass.getuser()}").symlink_to(tmp_path / "other")
    use_private_compile_cache()
    assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"


def test_compile_cache_is_temporary_without_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    use_private_compile_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("plan", [None, "same inputs", "other inputs"])
@pytest.mark.parametrize(
    "name", ["raw/lines/mine.jsonl", "modules/train/notes.txt", "a/b/film.part", ".work/keep/x", "00000.tokens"]
)
def test_forged_unfinished_store_deletes_no_file(small: Path, tmp_path: Path, plan: str | None, name: str) -> None:
    store = tmp_path / "home"
    recipe = Recipe.load(small / "recipe.yaml", {"data.store": str(store)})
    (store / ".work").mkdir(parents=True)
    if plan:
        settings = store_settings(recipe, Tokenizer.load(recipe.tokenizer))
        inputs = plan_job(recipe).inputs if plan == "same inputs" else {"other": 1}
        write_json(store / ".work/plan.json", {"settings": settings, "inputs": inputs})
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_text("precious")
    for junk in (".DS_Store", ".work/.nfs0001"):
        (store / junk).write_text("junk")
    if plan is None or name.startswith(".work"):
        with pytest.raises(InputError, match=f"home/{name}: not a file of this token store"):
            build_store(recipe)
        assert (store / name).read_text() == "precious"
        (store / name).rename(tmp_path / "moved")
    assert build_store(recipe)
    assert (store / name).exists() != (tmp_path / "moved").exists()
    assert (store / ".work/.nfs0001").read_text() == "junk"


def test_unfinished_store_with_pipe_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load(small / "recipe.yaml", {"data.store": str(tmp_path / "store")})
    interrupt(recipe, monkeypatch, after=1)
    (path,) = (tmp_path / "store/.work/rejects").glob("*.jsonl")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{path.name}: not a regular file"):
        build_store(recipe)


@pytest.mark.parametrize("name", [".", "/", "inner/.."])
def test_store_in_the_folder_of_the_recipe_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "notes").write_text("precious")
    (tmp_path / ".work").mkdir()
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*; .*choose"):
        build_store(Recipe.load(small / "recipe.yaml", {"data.store": name}))
    assert (tmp_path / "notes").read_text() == "precious"


def test_finished_store_keeps_other_files_in_its_work_folder(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(small / "store", store)
    (store / ".work").mkdir()
    (store / ".work/notes").write_text("precious")
    assert build_store(Recipe.load(small / "recipe.yaml", {"data.store": str(store)}))
    assert (store / ".work/notes").read_text() == "precious"


def test_file_added_to_work_folder_during_preparation_is_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "store/.work/notes"
    monkeypatch.setattr("tinyllama.prepare.pipeline._check_inputs_unchanged", lambda *_: notes.write_text("precious"))
    assert build_store(Recipe.load(small / "recipe.yaml", {"data.store": str(tmp_path / "store")}))
    assert notes.read_text() == "precious"
    assert list(notes.parent.iterdir()) == [notes]
