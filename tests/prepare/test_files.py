"""Paths, globs and URLs refer to the same files everywhere, and an unreadable one is an error, never skipped."""

import errno
import os
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
from tests.faults.commands import drop_privileges, run_in_fork
from tests.prepare.raw import lines, slim, source, texts_of, write

from tinyllama.errors import InputError
from tinyllama.prepare.files import file_size, find_files, local_copy, modified_after, translate_read_errors
from tinyllama.prepare.readers import read_rows
from tinyllama.prepare.sources import check_sources_disjoint, list_files


@pytest.fixture
def remote() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty remote file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def names(path: Path | str) -> list[str]:
    """Return the .txt files that a path refers to, relative to its folder."""
    return ["/".join(file.parts) for file in find_files(str(path), lambda name: name.endswith(".txt"))]


@pytest.mark.parametrize("place", ["local", "remote"])
def test_globs_match_the_same_local_and_remote_files(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, place: str
) -> None:
    for name in ["a.txt", "b.txt", "b-2.txt", "d/a.txt", "d/e/c.txt", "d/.hidden/x.txt", "d/.y.txt", "d/a.log"]:
        write(tmp_path / "raw" / name, name.encode())
        remote.pipe(f"/raw/{name}", name.encode())
    root = str(tmp_path / "raw") if place == "local" else "memory://raw"
    everything = ["a.txt", "b-2.txt", "b.txt", "d/a.txt", "d/e/c.txt"]
    for path in (root, f"{root}/", f"{root}/**", f"{root}/**/*.txt"):
        assert names(path) == everything
    assert names(f"{root}/*") == everything  # a folder that a glob matches is searched recursively
    assert names(f"{root}/*.txt") == ["a.txt", "b-2.txt", "b.txt"]
    assert names(f"{root}/[ad].txt") == ["a.txt"]
    assert names(f"{root}/?/a.txt") == ["d/a.txt"]
    assert names(f"{root}/{{b,c,*-2}}.txt") == ["b-2.txt", "b.txt"]
    assert names(f"{root}/{{d,x}}/**/*.{{rst,txt}}") == ["d/a.txt", "d/e/c.txt"]
    assert names(f"{root}/{{{','.join(['d', *map(str, range(100, 200))])}}}/*.txt") == ["d/a.txt"]  # over 255 bytes
    assert names(f"{root}/{{a}}.txt") == names(f"{root}/{{a,b.txt") == []
    assert names(f"{root}/**/e/*.txt") == names(f"{root}/**/e") == ["d/e/c.txt"]
    assert names(f"{root}/*/.*") == ["d/.hidden/x.txt", "d/.y.txt"]  # hidden, but in the pattern
    assert names(f"{root}/nothing") == names(f"{root}/nothing*") == []
    assert [file.parts for file in find_files(f"{root}/d/a.log", lambda name: False)] == [()]


def test_existing_name_with_wildcard_is_not_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", b"")
    write(tmp_path / "a1.txt", b"")
    assert [Path(file.path).name for file in find_files(str(tmp_path / "a[1].txt"), bool)] == ["a[1].txt"]


@pytest.mark.parametrize("path", ["raw", "./raw/", "raw/*.txt", "r*/*.txt", "raw//a.txt", "**/a.txt"])
def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    write(tmp_path / "raw/a.txt", b"abc")
    monkeypatch.chdir(tmp_path)
    (file,) = find_files(path, lambda name: name.endswith(".txt"))
    assert (file.path, file.size) == ("raw/a.txt", 3)


def test_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a\udcff.txt", b"")
    with pytest.raises(InputError, match=r"a\\udcff.txt': .*not UTF-8"):
        names(tmp_path)


def test_pipe_or_device_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/link.txt").symlink_to("/dev/zero")
    for path, name in ((tmp_path / "pipe.txt", "pipe"), (tmp_path / "*.txt", "pipe"), (tmp_path / "d", "link")):
        with pytest.raises(InputError, match=f"{name}.txt: not a regular file"):
            names(path)


def test_broken_link_and_link_loop_are_errors(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"gone.txt: cannot be read \(No such file"):
        names(tmp_path)
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/back").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "**/*.txt"):
        with pytest.raises(InputError, match=r"d/back: a symbolic link to .*, which contains the link"):
            names(path)


@pytest.mark.parametrize("locked", ["folder", "file"])
@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/b.jsonl"])
def test_file_without_read_permission_is_an_error(tmp_path: Path, locked: str, pattern: str) -> None:
    write(tmp_path / "a.jsonl", lines({"text": "readable"}))
    path = write(tmp_path / "sub/b.jsonl", lines({"text": "not readable"}))
    (path if locked == "file" else path.parent).chmod(0)
    chosen = source("jsonl", f"{tmp_path}{pattern}")
    result = run_in_fork(lambda: len(list_files("notes", chosen)), tmp_path, drop_privileges)
    path.parent.chmod(0o755)
    expected = "sub/b.jsonl: no permission" if locked == "file" else "sub: cannot be read (Permission"
    assert f"InputError: {tmp_path}/{expected}" in result.output


def test_file_that_vanished_after_listing_is_an_error(tmp_path: Path) -> None:
    recipe = source("jsonl", write(tmp_path / "a.jsonl", lines({"text": "x"})))
    (file,) = list_files("notes", recipe)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No such file"):
        list(read_rows(file.path, recipe))
    for function in (file_size, lambda path: modified_after(path, 0)):
        with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No such file"):
            function(file.path)


def test_remote_data_reads_like_local_data(remote: fsspec.AbstractFileSystem) -> None:
    compressed = zstandard.compress(lines(slim("far"), slim("away", "RedPajamaBook")))
    for place in ("train/chunk1/b", "train/chunk1/a", "validation/chunk1/c", "test/chunk1/d"):
        remote.pipe(f"/slim/{place}.jsonl.zst", compressed)
    recipe = source("slimpajama", "memory://slim")
    assert [(file.path, file.split, file.size) for file in list_files("slim", recipe)] == [
        ("memory://slim/train/chunk1/a.jsonl.zst", "train", len(compressed)),
        ("memory://slim/train/chunk1/b.jsonl.zst", "train", len(compressed)),
        ("memory://slim/validation/chunk1/c.jsonl.zst", "validation", len(compressed)),
    ]
    assert texts_of(recipe) == ["far", "away"] * 3
    same = {"one": recipe, "other": source("slimpajama", "memory:///slim/train/*/a*")}
    with pytest.raises(InputError, match=r"data.sources.other: memory:///slim.*a.jsonl.zst is read by one too"):
        check_sources_disjoint(same, {name: list_files(name, own) for name, own in same.items()})


def test_local_copy_of_a_remote_file_is_temporary(
    remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.pipe("/raw/a.bin", b"abc")
    with local_copy("memory://raw/a.bin") as local:
        assert local.read_bytes() == b"abc"
    assert not local.exists()
    assert file_size("memory://raw/a.bin") == 3
    now = remote.modified("/raw/a.bin").timestamp()
    assert modified_after("memory://raw/a.bin", now - 1)
    assert not modified_after("memory://raw/a.bin", now + 1)
    with monkeypatch.context() as patch:  # as with http, which has no modification times
        patch.setattr(type(remote), "modified", fsspec.AbstractFileSystem.modified)
        assert not modified_after("memory://raw/a.bin", now - 1)
    with pytest.raises(InputError, match=r"memory://raw/b.bin: cannot be read"), local_copy("memory://raw/b.bin"):
        pass


def test_truncated_or_failed_download_is_an_error(
    remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.pipe("/raw/a.jsonl", lines({"text": "x"}, {"text": "y"}))
    monkeypatch.setattr(
        type(remote), "get_file", lambda self, path, local, **_: Path(local).write_bytes(b'{"text": "x"}\n')
    )
    with pytest.raises(InputError, match=r"memory://raw/a.jsonl: cannot be read \(14 of 28 bytes received\)"):
        texts_of(source("jsonl", "memory://raw/a.jsonl"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(type(remote), "get_file", Mock(side_effect=full))
    with pytest.raises(InputError, match=r"a.jsonl: cannot be read \(No space.*TMPDIR"):
        texts_of(source("jsonl", "memory://raw/a.jsonl"))


def test_remote_starcoderdata_is_checked_before_download(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, column in (("c", "content"), ("git-commits-cleaned", "diff")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / "a.parquet")
        remote.pipe(f"/star/{language}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert texts_of(source("starcoderdata", "memory://star", include=["c"])) == ["x"]
    monkeypatch.setattr(type(remote), "get_file", lambda *_: pytest.fail("downloaded before the check"))
    with pytest.raises(InputError, match=r"no column 'content' in git-commits-cleaned \(it has diff\)"):
        list_files("star", source("starcoderdata", "memory://star"))


def test_protocol_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"class": "no_such_package.FileSystem", "err": "Install no-such-package to access Nowhere"}
    monkeypatch.setitem(known_implementations, "abfss", unknown)
    with pytest.raises(InputError, match=r"abfss://bucket/a: Install no-such-package"):
        list_files("far", source("jsonl", "abfss://bucket/a"))


def test_modification_is_detected_despite_a_restored_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"")
    before = time.time() - 1
    assert modified_after(str(path), before)
    os.utime(path, (1000, 1000))
    assert modified_after(str(path), before)
    assert not modified_after(str(path), before + 1000)


@pytest.mark.parametrize(
    ("error", "expected", "remedy"),
    [
        (pyarrow.ArrowInvalid("bad magic"), InputError, r"a\.parquet: .*correct its suffix"),
        (pyarrow.ArrowNotImplementedError("encrypted"), InputError, r"a\.parquet: .*rewrite it without"),
        (pyarrow.ArrowMemoryError("4 GiB"), MemoryError, "4 GiB"),  # is not the file's fault
    ],
)
def test_error_of_pyarrow_has_its_remedy(error: Exception, expected: type[Exception], remedy: str) -> None:
    with pytest.raises(expected, match=remedy), translate_read_errors("a.parquet"):
        raise error
