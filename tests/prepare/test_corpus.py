"""The embedded corpus: schemas, sizes, the same bytes in every process, no file of another origin replaced."""

import hashlib
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from tests.conftest import write_older_corpus

from tinyllama.errors import InputError
from tinyllama.prepare.corpus import (
    EMBEDDED_CORPUS_MANIFEST,
    CorpusSizes,
    _package_files,
    write_corpus,
)

pytestmark = pytest.mark.slow

SLIMPAJAMA_SETS = {"RedPajamaC4", "RedPajamaCommonCrawl", "RedPajamaGithub", "RedPajamaWikipedia"}
STARCODERDATA_COLUMNS = {
    "max_stars_repo_path": pa.string(),
    "max_stars_repo_name": pa.string(),
    "max_stars_count": pa.int64(),
    "id": pa.string(),
    "content": pa.string(),
}


@dataclass
class Corpus:
    directory: Path
    sizes: CorpusSizes
    second: Path  # written by another process, in place of an earlier corpus
    prose: list[dict[str, Any]]
    code: dict[str, list[dict[str, Any]]]

    def prose_texts(self) -> list[str]:
        """The texts of prose, without source files."""
        return [row["text"] for row in self.prose if row["meta"]["redpajama_set_name"] != "RedPajamaGithub"]


@pytest.fixture(scope="module")
def corpus(embedded_corpora: tuple[Path, Path, CorpusSizes]) -> Corpus:
    directory, second, sizes = embedded_corpora
    prose = []
    for path in sorted(directory.rglob("*.jsonl.zst")):
        with path.open("rb") as file:
            stream = zstandard.ZstdDecompressor().stream_reader(file)
            prose += [json.loads(line) for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n")]
    code = {
        folder.name: [row for path in sorted(folder.iterdir()) for row in pa.parquet.read_table(path).to_pylist()]
        for folder in sorted((directory / "starcoderdata").iterdir())
    }
    return Corpus(directory, sizes, second, prose, code)


def test_prose_has_the_schema_of_slimpajama(corpus: Corpus) -> None:
    files = [path for path in (corpus.directory / "slimpajama").rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {corpus.directory / "slimpajama/train/chunk1"}
    for row in corpus.prose:
        assert row.keys() == {"text", "meta"}
        assert row["meta"].keys() == {"redpajama_set_name"}
        assert row["meta"]["redpajama_set_name"] in SLIMPAJAMA_SETS
        assert row["text"].strip()


def test_code_has_the_schema_of_starcoderdata(corpus: Corpus) -> None:
    for folder in (corpus.directory / "starcoderdata").iterdir():
        files = sorted(folder.iterdir())
        assert [f.name for f in files] == [f"train-{n:05}-of-{len(files):05}.parquet" for n in range(len(files))]
        for file in files:
            schema = pa.parquet.read_schema(file)
            assert dict(zip(schema.names, schema.types, strict=True)) == STARCODERDATA_COLUMNS
    rows = [row for rows in corpus.code.values() for row in rows]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["max_stars_count"] == 0
        assert all(row[name].strip() for name in ("max_stars_repo_path", "max_stars_repo_name", "id", "content"))


def test_sizes_suffice_for_the_demo(corpus: Corpus) -> None:
    prose, code = corpus.sizes["slimpajama"], corpus.sizes["starcoderdata"]
    assert sum(prose.values()) >= 15e6
    assert 2e6 < prose["RedPajamaGithub"] < 0.25 * sum(prose.values())  # the demo's recipe excludes it
    assert sum(code.values()) >= 25e6
    assert 0.4 < code["python"] / sum(code.values()) < 0.8
    assert len(code) >= 8


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != EMBEDDED_CORPUS_MANIFEST
    }


def test_sizes_and_hashes_are_those_of_the_files(corpus: Corpus) -> None:
    prose: Counter[str] = Counter()
    for row in corpus.prose:
        prose[row["meta"]["redpajama_set_name"]] += len(row["text"].encode())
    code = {name: sum(len(row["content"].encode()) for row in rows) for name, rows in corpus.code.items()}
    assert corpus.sizes == {"slimpajama": prose, "starcoderdata": code}
    manifest = json.loads((corpus.directory / EMBEDDED_CORPUS_MANIFEST).read_text())
    assert manifest == {"files": hashes(corpus.directory), "bytes": corpus.sizes}


def test_same_packages_give_the_same_bytes_in_another_process(corpus: Corpus) -> None:
    assert hashes(corpus.directory) == hashes(corpus.second)
    assert (corpus.directory / EMBEDDED_CORPUS_MANIFEST).read_bytes() == (
        corpus.second / EMBEDDED_CORPUS_MANIFEST
    ).read_bytes()
    assert {path.name for path in corpus.second.iterdir()} == {"slimpajama", "starcoderdata", EMBEDDED_CORPUS_MANIFEST}


def test_no_paragraph_or_source_file_is_repeated(corpus: Corpus) -> None:
    blocks = Counter(block for text in corpus.prose_texts() for block in text.split("\n\n"))
    assert [block[:200] for block, count in blocks.items() if count > 1] == []
    sources = Counter(row["content"] for rows in corpus.code.values() for row in rows)
    assert sum(count - 1 for count in sources.values()) < 0.01 * len(sources)  # equal but for a license


def test_prose_is_english_and_lines_of_code_are_short(corpus: Corpus) -> None:
    prose = " ".join(corpus.prose_texts())
    assert Counter(re.findall(r"[a-z]+", prose.lower())).most_common(1)[0][0] == "the"
    assert ">>>" not in prose
    assert max(len(line) for rows in corpus.code.values() for row in rows for line in row["content"].split("\n")) <= 500


@pytest.mark.parametrize("name", ["slimpajama/train/chunk1/example_train_0.jsonl.zst", "starcoderdata/c/notes.txt"])
def test_files_of_another_origin_are_refused_and_kept(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"somebody's own data")
    with pytest.raises(InputError, match=re.escape(str(other))) as refusal:
        write_corpus(tmp_path)
    assert "\n" not in str(refusal.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    assert other.read_bytes() == b"somebody's own data"


def test_a_changed_corpus_is_refused_and_kept(tmp_path: Path) -> None:
    write_older_corpus(tmp_path)
    changed = tmp_path / "starcoderdata/python/train-00000-of-00009.parquet"
    changed.write_bytes(b"with rows of my own")
    with pytest.raises(InputError, match=re.escape(str(changed))):
        write_corpus(tmp_path)
    assert changed.read_bytes() == b"with rows of my own"


def install(site_packages: Path, name: str, files: dict[str, str]) -> None:
    """Lay out a package as pip does: files, dist-info, RECORD."""
    information = f"{name}-1.0.dist-info"
    files = {**files, f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nText"}
    for path, content in files.items():
        (site_packages / path).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / path).write_text(content)
    record = "".join(f"{path},,\n" for path in [*files, f"{information}/RECORD"])
    (site_packages / information / "RECORD").write_text(record)


def test_only_files_listed_by_installed_packages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_packages = tmp_path / "lib/site-packages"
    cached = {"My_Package/__pycache__/a.cpython-311.pyc": "", "../../bin/script.py": "#!/machine/python"}
    install(site_packages, "My_Package", {"My_Package/a.py": "a = 1", "My_Package/gone.py": "", **cached})
    install(site_packages, "tinyllama", {"tinyllama/c.py": "c = 1"})
    install(site_packages, "lm_eval", {"lm_eval/tasks.yaml": "the questions of the test"})
    (site_packages / "My_Package/stray.py").write_text("stray = 1")
    (site_packages / "My_Package/gone.py").unlink()
    install(tmp_path / "work", "egg", {"egg/d.py": "d = 1"})
    monkeypatch.setattr(sys, "path", [str(tmp_path / "work"), str(site_packages)])
    files = _package_files()
    read = {(file.package, file.file) for file in files if file.package != "cpython"}
    assert read == {("my-package", name) for name in ("My_Package-1.0.dist-info/METADATA", "My_Package/a.py")}
    names = {file.file for file in files}
    assert {"json/decoder.py", "textwrap.py"} <= names
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
