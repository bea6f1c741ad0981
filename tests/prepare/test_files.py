"""Paths, globs and URLs: every file that they stand for, and none left out without a word."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import fsspec  # type: ignore[import-untyped]
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fsspec.registry import known_implementations  # type: ignore[import-untyped]
from tests.prepare.raw import lines, slim, source, texts_of, write

from tinyllama.errors import InputError
from tinyllama.prepare.files import file_size, find_files, local_copy, modified_after
from tinyllama.prepare.readers import read_rows
from tinyllama.prepare.sources import check_sources_disjoint, list_files


@pytest.fixture
def remote() -> Iterator[fsspec.AbstractFileSystem]:
    """A remote file system that is empty, before and after."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def names(path: Path | str) -> list[str]:
    """What a path stands for, relative to its folder."""
    return ["/".join(file.parts) for file in find_files(str(path), lambda name: name.endswith(".txt"))]


@pytest.mark.parametrize("place", ["local", "remote"])
def test_globs_mean_the_same_here_and_far_away(tmp_path: Path, remote: fsspec.AbstractFileSystem, place: str) -> None:
    everything = ["a.txt", "b.txt", "b-2.txt", "d/a.txt", "d/e/c.txt", "d/.hidden/x.txt", "d/.y.txt", "d/a.log"]
    for name in everything:
        write(tmp_path / "raw" / name, name.encode())
        remote.pipe(f"/raw/{name}", name.encode())
    root = str(tmp_path / "raw") if place == "local" else "memory://raw"
    whole = ["a.txt", "b-2.txt", "b.txt", "d/a.txt", "d/e/c.txt"]
    assert names(root) == names(f"{root}/") == names(f"{root}/**") == names(f"{root}/**/*.txt") == whole
    assert names(f"{root}/*") == whole  # a folder that a glob matches is read with everything below it
    assert names(f"{root}/*.txt") == ["a.txt", "b-2.txt", "b.txt"]
    assert names(f"{root}/[ad].txt") == ["a.txt"]
    assert names(f"{root}/?/a.txt") == ["d/a.txt"]
    assert names(f"{root}/**/e/*.txt") == names(f"{root}/**/e") == ["d/e/c.txt"]
    assert names(f"{root}/*/.*") == ["d/.hidden/x.txt", "d/.y.txt"]  # hidden, but asked for
    assert names(f"{root}/nothing") == names(f"{root}/nothing*") == []
    assert [file.parts for file in find_files(f"{root}/d/a.log", lambda name: False)] == [()]


def test_a_name_with_a_wildcard_in_it_is_a_name_where_it_exists(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", b"")
    write(tmp_path / "a1.txt", b"")
    assert [Path(file.path).name for file in find_files(str(tmp_path / "a[1].txt"), bool)] == ["a[1].txt"]


def test_relative_paths_and_globs_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "raw/a.txt", b"abc")
    monkeypatch.chdir(tmp_path)
    for path in ("raw", "./raw/", "raw/*.txt", "r*/*.txt", "raw//a.txt", "**/a.txt"):
        assert [(file.path, file.size) for file in find_files(path, lambda name: name.endswith(".txt"))] == [
            ("raw/a.txt", 3)
        ]


def test_a_name_that_no_manifest_can_hold_is_named_as_python_writes_it(tmp_path: Path) -> None:
    write(tmp_path / "a\udcff.txt", b"")
    with pytest.raises(InputError, match=r"a\\udcff.txt': the name is not UTF-8.*; rename"):
        names(tmp_path)


def test_a_pipe_or_a_device_is_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link.txt").symlink_to("/dev/zero")
    for path, name in ((tmp_path / "pipe.txt", "pipe"), (tmp_path / "*.txt", "pipe"), (tmp_path / "d", "link")):
        with pytest.raises(InputError, match=f"{name}.txt: not a regular file"):
            names(path)


def test_a_link_that_leads_nowhere_or_back_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"gone.txt: cannot be read \(No such file"):
        names(tmp_path)
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/back").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "**/*.txt"):
        with pytest.raises(InputError, match=r"d/back: a symbolic link to .*, a folder above it"):
            names(path)


LIST_WITHOUT_RIGHTS = """
import os, sys
from tinyllama.prepare.sources import list_files
from tinyllama.errors import InputError
from tinyllama.recipe import Source
if os.geteuid() == 0:  # whom permission bits do not bind
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(list_files("notes", Source(format="jsonl", path=sys.argv[1], weight=1)))
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("locked", ["folder", "file"])
@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/b.jsonl"])
def test_what_may_not_be_read_is_named_and_never_left_out(locked: str, pattern: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is its owner's alone
        root = Path(folder)
        root.chmod(0o755)
        write(root / "a.jsonl", lines({"text": "readable"}))
        path = write(root / "sub/b.jsonl", lines({"text": "not readable"}))
        (path if locked == "file" else path.parent).chmod(0)
        try:
            run = [sys.executable, "-c", LIST_WITHOUT_RIGHTS, f"{root}{pattern}"]
            said = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout
        finally:
            path.parent.chmod(0o755)
    place, reason = ("sub/b.jsonl", "no permission") if locked == "file" else ("sub", "cannot be read (Permission")
    assert said.startswith(f"{root}/{place}: {reason}")


def test_a_file_that_vanished_since_it_was_listed_is_named(tmp_path: Path) -> None:
    recipe = source("jsonl", write(tmp_path / "a.jsonl", lines({"text": "x"})))
    (file,) = list_files("notes", recipe)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"a.jsonl: cannot be read to its end \(No such file"):
        list(read_rows(file.path, recipe))
    for ask in (file_size, lambda path: modified_after(path, 0)):
        with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No such file"):
            ask(file.path)


def test_remote_data_reads_as_local_data_does(remote: fsspec.AbstractFileSystem) -> None:
    packed = zstandard.compress(lines(slim("far"), slim("away", "RedPajamaBook")))
    for place in ("train/chunk1/b", "train/chunk1/a", "validation/chunk1/c", "test/chunk1/d"):
        remote.pipe(f"/slim/{place}.jsonl.zst", packed)
    recipe = source("slimpajama", "memory://slim")
    assert [(file.path, file.split, file.size) for file in list_files("slim", recipe)] == [
        ("memory://slim/train/chunk1/a.jsonl.zst", "train", len(packed)),
        ("memory://slim/train/chunk1/b.jsonl.zst", "train", len(packed)),
        ("memory://slim/validation/chunk1/c.jsonl.zst", "validation", len(packed)),
    ]
    assert texts_of(recipe) == ["far", "away"] * 3
    same = {"one": recipe, "other": source("slimpajama", "memory:///slim/train/*/a*")}
    with pytest.raises(InputError, match=r"data.sources.other: memory:///slim.*a.jsonl.zst is read by one too"):
        check_sources_disjoint(same, {name: list_files(name, own) for name, own in same.items()})


def test_a_remote_file_is_there_as_a_local_one_as_long_as_it_is_needed(remote: fsspec.AbstractFileSystem) -> None:
    remote.pipe("/raw/a.bin", b"abc")
    with local_copy("memory://raw/a.bin") as local:
        assert local.read_bytes() == b"abc"
    assert not local.exists()
    assert file_size("memory://raw/a.bin") == 3
    now = remote.modified("/raw/a.bin").timestamp()
    assert modified_after("memory://raw/a.bin", now - 1)
    assert not modified_after("memory://raw/a.bin", now + 1)
    with pytest.raises(InputError, match=r"memory://raw/b.bin: cannot be read"), local_copy("memory://raw/b.bin"):
        pass


def test_a_remote_file_that_arrives_cut_is_refused(
    remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.pipe("/raw/a.jsonl", lines({"text": "x"}, {"text": "y"}))
    monkeypatch.setattr(
        type(remote), "get_file", lambda self, path, local, **_: Path(local).write_bytes(b'{"text": "x"}\n')
    )
    with pytest.raises(InputError, match=r"memory://raw/a.jsonl: cannot be read \(14 of 28 bytes arrived\)"):
        texts_of(source("jsonl", "memory://raw/a.jsonl"))


def test_starcoderdata_far_away_is_checked_before_it_is_fetched(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, column in (("c", "content"), ("git-commits-cleaned", "diff")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / "a.parquet")
        remote.pipe(f"/star/{language}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert texts_of(source("starcoderdata", "memory://star", include=["c"])) == ["x"]
    monkeypatch.setattr(type(remote), "get_file", lambda *_: pytest.fail("fetched before it was checked"))
    with pytest.raises(InputError, match=r"no column 'content' in git-commits-cleaned \(it has diff\)"):
        list_files("star", source("starcoderdata", "memory://star"))


def test_a_protocol_without_its_package_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"class": "no_such_package.FileSystem", "err": "Install no-such-package to access Nowhere"}
    monkeypatch.setitem(known_implementations, "abfss", unknown)
    with pytest.raises(InputError, match=r"abfss://bucket/a: Install no-such-package to access Nowhere"):
        list_files("far", source("jsonl", "abfss://bucket/a"))


def test_a_remote_file_that_finds_no_room_here_says_where_to_make_some(
    remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.pipe("/raw/a.jsonl", b"{}")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(type(remote), "get_file", Mock(side_effect=full))
    with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No space.*free some space in .* or set TMPDIR"):
        texts_of(source("jsonl", "memory://raw/a.jsonl"))


def test_a_written_file_counts_as_modified_from_its_time_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"")
    before = time.time() - 1
    assert modified_after(str(path), before)
    os.utime(path, (1000, 1000))
    assert modified_after(str(path), before), "a tool that sets the time back does not hide the change"
    assert not modified_after(str(path), before + 1000)
