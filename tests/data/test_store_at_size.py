"""A split is one array across its shards, and a trillion tokens are opened and read in little memory."""

import errno
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tinyllama.data.store import FORMAT_VERSION, TokenStore
from tinyllama.errors import InputError

READ_PROGRAM = Path(__file__).parent / "read_program.py"
SHA256 = "0123456789abcdef" * 4


def write_store(folder: Path, shard_tokens: dict[str, list[int]], inputs_each: int = 1) -> Path:
    """Write a store of sparse files, all zeros, with manifests as long as real ones."""
    for source, sizes in shard_tokens.items():
        (folder / source / "train").mkdir(parents=True)
        shards = [write_shard(folder / source / "train", n, size, inputs_each) for n, size in enumerate(sizes)]
        manifest = {"tokens": sum(sizes), "documents": len(sizes), "rows": {"read": 1, "kept": 1, "dropped": {}}}
        (folder / source / "train/manifest.json").write_text(json.dumps(manifest | {"shards": shards}, indent=2))
    count = inputs_each * sum(map(len, shard_tokens.values()))
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": "<u2",
        "sources": {source: {"splits": {"train": {"tokens": sum(sizes)}}} for source, sizes in shard_tokens.items()},
        "inputs": {f"raw/SlimPajama-627B/train/chunk1/example_train_{n}.jsonl.zst": n for n in range(count)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return folder


def write_shard(folder: Path, number: int, tokens: int, inputs: int) -> dict[str, object]:
    with (folder / f"{number:05d}.tokens").open("wb") as file:
        file.truncate(tokens * 2)
    (folder / f"{number:05d}.documents").write_bytes(tokens.to_bytes(8, "little"))
    path = f"raw/SlimPajama-627B/train/chunk1/example_train_{number}"
    return {
        "file": f"{number:05d}.tokens",
        "tokens": tokens,
        "documents": 1,
        "sha256": SHA256,
        "documents_sha256": SHA256,
        "inputs": [{"path": f"{path}-{k}.jsonl.zst", "bytes": 16_000_000, "sha256": SHA256} for k in range(inputs)],
    }


def test_a_trillion_tokens_need_little_memory_at_any_step(tmp_path: Path) -> None:
    # 14,900 shards of 68M tokens from 59,600 files, as many as SlimPajama and Starcoderdata have together.
    write_store(tmp_path, {"slimpajama": [68_000_000] * 10_400, "starcoderdata": [68_000_000] * 4_500}, inputs_each=4)
    done = subprocess.run(
        [sys.executable, str(READ_PROGRAM), str(tmp_path)], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["tokens"] > 10**12
    assert found["read"] == [1, 2049]
    assert not found["torch"]
    assert found["peak_bytes"] < 300e6
    for early, late in zip(*found["work"], strict=True):
        assert late < 2 * early  # _floor_sum takes a few more divisions


@pytest.fixture
def counting(tmp_path: Path) -> TokenStore:
    """Return a store of 300 shards of 1 to 7 tokens, each token its own index."""
    sizes = [1 + number % 7 for number in range(300)]
    folder = write_store(tmp_path / "store", {"a": sizes})
    ends = np.cumsum([0, *sizes])
    for number, (start, end) in enumerate(pairwise(ends.tolist())):
        np.arange(start, end, dtype="<u2").tofile(folder / f"a/train/{number:05d}.tokens")
    return TokenStore.open(folder)


def test_a_read_crosses_shards(counting: TokenStore) -> None:
    split = counting["a/train"]
    assert np.array_equal(split.read(0, split.num_tokens), np.arange(split.num_tokens))
    for start in range(40):
        for stop in range(start, 60):
            assert split.read(start, stop).tolist() == list(range(start, stop))
    for start, stop in ((-1, 3), (5, split.num_tokens + 1), (3, 2)):
        with pytest.raises(IndexError, match=f"{start}:{stop} of .*a/train"):
            split.read(start, stop)


def test_few_files_are_open_and_none_after_the_store_is_deleted(counting: TokenStore) -> None:
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    split = counting.splits.pop("a/train")
    split.read(0, split.num_tokens)
    assert len(os.listdir("/dev/fd")) - before <= 128  # noqa: PTH208
    del split
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


def test_partial_reads_are_completed(counting: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 5), offset))
    assert counting["a/train"].read(3, 50).tolist() == list(range(3, 50))


def test_a_failing_file_is_named(counting: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    split = counting["a/train"]
    os.truncate(split.folder / "00006.tokens", 6)
    with pytest.raises(InputError, match=r"a/train/00006.tokens: ends at byte 6"):
        split.read(20, 40)
    with pytest.raises(InputError, match=r"a/train/00006.tokens: has 6 bytes"):
        TokenStore.open(counting.folder)
    (split.folder / "00007.tokens").unlink()
    with pytest.raises(FileNotFoundError) as missing:
        split.read(28, 29)
    assert missing.value.filename == str(split.folder / "00007.tokens")

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error") as broken:
        split.read(0, 1)
    assert broken.value.filename == str(split.folder / "00000.tokens")
