"""Every change to a token store's files is found."""

import os
import shutil
from pathlib import Path

import pytest

from tinyllama.cli import main
from tinyllama.errors import InputError
from tinyllama.prepare.inspection import find_corruption


@pytest.fixture
def store(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small / "store", tmp_path / "store")
    return tmp_path / "store"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_intact_store_has_no_problems(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_corruption(store) == []
    assert main(["inspect", str(store), "--verify"]) == 0
    assert "all files are present" in capsys.readouterr().out


def test_one_flipped_bit_in_any_file_is_found_by_name(store: Path) -> None:
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 12
    for path in files:
        intact = path.read_bytes()
        for place in (0, len(intact) // 2, len(intact) - 1):
            flip(path, place)
            named = path.with_name("manifest.json") if path.name == "manifest.sha256" else path
            found = find_corruption(store)
            assert any(str(named) in problem for problem in found), (path, place, found)
            assert not any(problem.endswith("is unexpected") for problem in found)
            path.write_bytes(intact)
    assert find_corruption(store) == []


def test_a_manifest_with_damaged_keys_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, split = store / "manifest.json", store / "modules/train/manifest.json"
    for path, key in ((manifest, "dtype"), (manifest, "sources"), (manifest, "splits"), (split, "shards")):
        intact = path.read_text()
        path.write_text(intact.replace(f'"{key}"', f'"x{key[1:]}"'))
        assert any(str(path) in problem for problem in find_corruption(store)), key
        assert main(["inspect", str(store)]) == 2
        assert "--verify" in capsys.readouterr().err
        path.write_text(intact)
    manifest.unlink()
    assert find_corruption(store) == [
        f"{manifest} is missing",
        f"{manifest} cannot be used; no other file was checked",
    ]


def test_unexpected_files_of_every_kind_are_named(store: Path) -> None:
    (store / "empty").mkdir()
    (store / "modules/link").symlink_to("/etc")
    (store / "dangling").symlink_to("nowhere")
    assert find_corruption(store) == [f"{store / name} is unexpected" for name in ("dangling", "empty", "modules/link")]


def test_damage_of_every_kind_is_found_by_name(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store / "modules/train"
    flip(folder / "00000.tokens", 100)
    (folder / "00000.documents").unlink()
    (folder / "00000.rows").write_bytes((folder / "00000.rows").read_bytes()[:-8])
    (folder / "stray.bin").write_bytes(b"x")
    (store / "lines/validation/manifest.json").unlink()
    assert find_corruption(store) == [
        f"{folder}/00000.tokens does not match its hash",
        f"{folder}/00000.documents is missing",
        f"{folder}/00000.rows does not match its hash",
        f"{store}/lines/validation/manifest.json is missing",
        f"{folder}/stray.bin is unexpected",
    ]
    assert main(["inspect", str(store), "--verify"]) == 1
    assert capsys.readouterr().out.count("\n") == 5


def test_oversized_hash_file_is_not_read(store: Path) -> None:
    os.truncate(store / "manifest.sha256", 1 << 29)
    (problem,) = find_corruption(store)
    assert problem.startswith(f"{store}/manifest.sha256: is larger than 256 MiB")


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished token store"):
        find_corruption(tmp_path)
