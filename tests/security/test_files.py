"""Locks and logs in a stranger's run lead nowhere: a symbolic link is refused, and what it leads to is as it was."""

from pathlib import Path

import pytest

from tinyllama.errors import InputError
from tinyllama.files import alone_in, locked, open_unfollowed, write_atomically


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(victim)
    with pytest.raises(InputError, match="run/lock: is a symbolic link"), alone_in(tmp_path / "run", "lock", ""):
        pass
    with pytest.raises(InputError, match="run/lock: is a symbolic link"), locked(tmp_path / "run/lock"):
        pass
    assert victim.read_text() == "precious"


def test_a_lock_that_is_another_name_of_a_file_keeps_its_bytes(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "lock").hardlink_to(victim)
    with alone_in(tmp_path, "lock", ""):
        assert victim.read_text() == "precious"


def test_what_is_appended_follows_no_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to(victim)
    with (
        pytest.raises(InputError, match=r"events\.jsonl: is a symbolic link"),
        open_unfollowed(tmp_path / "events.jsonl"),
    ):
        pass
    assert victim.read_text() == "precious"


def test_an_atomic_write_replaces_a_link_and_keeps_its_target(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "report.html").symlink_to(victim)
    with write_atomically(tmp_path / "report.html") as file:
        file.write(b"new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "report.html").read_bytes() == b"new"
