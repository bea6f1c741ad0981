import hashlib
import io
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from tests.conftest import write_older_corpus

from tinyllama.errors import InputError
from tinyllama.prepare.corpus import MANIFEST, CorpusReport, write_corpus
from tinyllama.prepare.corpus_files import distribution_files, standard_library_files
from tinyllama.prepare.corpus_text import code_reject_reason, documentation, paragraphs, strip_repeated_license

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
    report: CorpusReport
    second: Path  # written by another process, over a former run
    prose: list[dict[str, Any]]
    code: dict[str, list[dict[str, Any]]]

    def texts(self) -> list[str]:
        return [row["text"] for row in self.prose] + [row["content"] for rows in self.code.values() for row in rows]


def read_jsonl_zst(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n")
        return [json.loads(line) for line in text]


@pytest.fixture(scope="module")
def corpus(embedded_corpora: tuple[Path, Path, CorpusReport]) -> Corpus:
    directory, second, report = embedded_corpora
    prose = [row for path in sorted(directory.rglob("*.jsonl.zst")) for row in read_jsonl_zst(path)]
    code = {
        folder.name: [row for path in sorted(folder.iterdir()) for row in pa.parquet.read_table(path).to_pylist()]
        for folder in sorted((directory / "starcoderdata").iterdir())
    }
    return Corpus(directory, report, second, prose, code)


def test_prose_has_slimpajamas_layout_and_rows(corpus: Corpus) -> None:
    files = sorted((corpus.directory / "slimpajama").rglob("*.*"))
    chunk = corpus.directory / "slimpajama" / "train" / "chunk1"
    assert files == sorted(chunk / f"example_train_{number}.jsonl.zst" for number in range(len(files)))
    for row in corpus.prose:
        assert row.keys() == {"text", "meta"}
        assert row["meta"].keys() == {"redpajama_set_name"}
        assert row["meta"]["redpajama_set_name"] in SLIMPAJAMA_SETS
        assert row["text"].strip()


def test_code_has_starcoderdatas_layout_and_columns(corpus: Corpus) -> None:
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


def test_sizes_suffice_and_python_is_one_language_of_several(corpus: Corpus) -> None:
    assert sum(size.bytes for size in corpus.report.prose.values()) >= 15e6
    assert sum(size.bytes for size in corpus.report.code.values()) >= 25e6
    code = {language: size.bytes for language, size in corpus.report.code.items()}
    assert 0.4 < code["python"] / sum(code.values()) < 0.8
    assert len(code) >= 8


def test_leaving_out_github_makes_a_difference_and_leaves_most_of_the_prose(corpus: Corpus) -> None:
    prose = {name: size.bytes for name, size in corpus.report.prose.items()}
    assert 2e6 < prose["RedPajamaGithub"] < 0.25 * sum(prose.values())


def test_report_and_manifest_tell_what_was_written(corpus: Corpus) -> None:
    written = Counter(row["meta"]["redpajama_set_name"] for row in corpus.prose)
    assert {name: size.documents for name, size in corpus.report.prose.items()} == written
    code = corpus.report.code
    assert {language: size.documents for language, size in code.items()} == {n: len(r) for n, r in corpus.code.items()}
    for language, rows in corpus.code.items():
        assert code[language].bytes == sum(len(row["content"].encode()) for row in rows)
    assert all(count > 0 for count in corpus.report.left_out.values())
    manifest = json.loads((corpus.directory / MANIFEST).read_text())
    assert manifest.pop("files") == hashes(corpus.directory)
    assert manifest == asdict(corpus.report)


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def test_same_packages_give_the_same_bytes_in_another_process_over_a_former_run(corpus: Corpus) -> None:
    assert hashes(corpus.directory) == hashes(corpus.second)
    assert (corpus.directory / MANIFEST).read_bytes() == (corpus.second / MANIFEST).read_bytes()
    assert {path.name for path in corpus.second.iterdir()} == {"slimpajama", "starcoderdata", MANIFEST}


def test_no_text_stands_twice_in_either_half_or_both(corpus: Corpus) -> None:
    texts = Counter(" ".join(text.split()) for text in corpus.texts())
    assert [text[:200] for text, count in texts.items() if count > 1] == []
    prose = [row["text"] for row in corpus.prose if row["meta"]["redpajama_set_name"] != "RedPajamaGithub"]
    blocks = Counter(block for text in prose for block in text.split("\n\n"))
    assert [block[:200] for block, count in blocks.items() if count > 1] == []


def test_no_paragraph_of_prose_stands_in_the_code(corpus: Corpus) -> None:
    """Comment marks and line breaks aside: both are compared as their letters; one paragraph in eighty is tried."""
    letters = re.compile(r"[^A-Za-z]+")
    code = " ".join(letters.sub(" ", row["content"]) for rows in corpus.code.values() for row in rows)
    prose = [row["text"] for row in corpus.prose if row["meta"]["redpajama_set_name"] != "RedPajamaGithub"]
    blocks = [letters.sub(" ", block).strip() for text in prose for block in text.split("\n\n")]
    tried = [block for block in sorted(blocks) if len(block) >= 60][::80]
    assert len(tried) > 500
    assert [block for block in tried if f" {block} " in code] == []


def test_prose_reads_as_english_and_code_as_code(corpus: Corpus) -> None:
    prose = " ".join(row["text"] for row in corpus.prose if row["meta"]["redpajama_set_name"] != "RedPajamaGithub")
    words = re.findall(r"[a-z]+", prose.lower())
    assert Counter(words).most_common(1)[0][0] == "the"
    assert prose.count(">>>") < 1e-5 * len(prose)
    assert max(len(line) for rows in corpus.code.values() for row in rows for line in row["content"].split("\n")) <= 500


@pytest.mark.parametrize("name", ["slimpajama/train/chunk1/example_train_0.jsonl.zst", "starcoderdata/c/notes.txt"])
def test_files_of_another_origin_are_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    foreign = tmp_path / name
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"somebody's own data")
    with pytest.raises(InputError, match=re.escape(str(foreign))) as refusal:
        write_corpus(tmp_path)
    assert "\n" not in str(refusal.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [foreign]
    assert foreign.read_bytes() == b"somebody's own data"


def test_a_corpus_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    write_older_corpus(tmp_path)
    changed = tmp_path / "starcoderdata" / "python" / "train-00000-of-00009.parquet"
    changed.write_bytes(b"with rows of my own")
    with pytest.raises(InputError, match=re.escape(str(changed))):
        write_corpus(tmp_path)
    assert changed.read_bytes() == b"with rows of my own"


def test_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("no directory")
    with pytest.raises(InputError, match="give another directory"):
        write_corpus(tmp_path / "corpus")


def install(site_packages: Path, name: str, files: dict[str, str], direct_url: dict[str, Any] | None = None) -> None:
    """Lay out a distribution as pip does: files, dist-info, RECORD."""
    information = f"{name}-1.0.dist-info"
    files = {**files, f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nText"}
    files |= {f"{information}/INSTALLER": "pip", f"{information}/direct_url.json": json.dumps(direct_url or {})}
    for path, content in files.items():
        (site_packages / path).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / path).write_text(content)
    record = "".join(f"{path},,\n" for path in [*files, f"{information}/RECORD"])
    (site_packages / information / "RECORD").write_text(record)


def test_only_what_distributions_brought_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_packages = tmp_path / "lib" / "site-packages"
    cached = {"My_Package/__pycache__/a.cpython-311.pyc": "", "../../bin/my-script": "#!/machine/python"}
    install(site_packages, "My_Package", {"My_Package/a.py": "a = 1", "My_Package/gone.py": "", **cached})
    install(site_packages, "editable", {"editable/b.py": "b = 1"}, {"url": "file:///b", "dir_info": {"editable": True}})
    install(site_packages, "tinyllama", {"tinyllama/c.py": "c = 1"})
    install(site_packages, "lm_eval", {"lm_eval/tasks.yaml": "the questions of the test"})
    (site_packages / "My_Package" / "stray.py").write_text("stray = 1")
    (site_packages / "My_Package" / "gone.py").unlink()
    install(tmp_path / "work", "egg", {"egg/d.py": "d = 1"})
    monkeypatch.setattr(sys, "path", [str(tmp_path / "work"), str(site_packages)])
    assert sorted(distribution_files()) == [
        ("my-package", name, site_packages / name) for name in ("My_Package-1.0.dist-info/METADATA", "My_Package/a.py")
    ]


def test_standard_library_is_listed_by_its_own_names() -> None:
    names = {name for _, name, _ in standard_library_files()}
    assert {"Lib/json/decoder.py", "Lib/textwrap.py"} <= names
    assert not any("site-packages" in name or "__pycache__" in name or "_sysconfigdata" in name for name in names)


def test_documentation_is_docstrings_and_long_comments_and_no_other_strings() -> None:
    comment = "This comment is long enough to be worth reading, since it gives a reason. " * 2
    source = f'''
"""Module."""
template = """No docstring."""
# A quote that opens nothing: """
# {comment}
def f():
    r"""First \\d line.

    Next.
        Deeper.
    """
    return "\'\'\'" + f"""{{x}}"""
'''
    found = list(documentation(source))
    assert [found[0], found[2]] == ["Module.", "First \\d line.\n\nNext.\n    Deeper."]
    assert len(found) == 3
    assert comment.strip() in found[1]


def test_paragraphs_lose_markup_and_hard_line_breaks_but_keep_lists() -> None:
    text = """
Usage
=====

.. image:: badge.svg

This function joins the lines of :class:`~a.Paragraph` that were
broken at a margin, as ``textwrap`` would do it for the `reader
<https://example.org>`_.

>>> join("a b c d e f g h")

Parameters
----------
lines : list of str, which are the ones that shall be joined
    The lines as they stand in the file, with their ends.
width : int
    The width that none of the lines will be wider than.
"""
    assert list(paragraphs(text)) == [
        "This function joins the lines of `a.Paragraph` that were broken at a margin, "
        "as `textwrap` would do it for the reader.",
        "Parameters\nlines : list of str, which are the ones that shall be joined\n"
        "    The lines as they stand in the file, with their ends.\n"
        "width : int\n    The width that none of the lines will be wider than.",
    ]


CODE = "def first(values):\n    return values[0] if values else None\n\n" * 20


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        (CODE, None),
        ("x = 1\n", "too short or too long"),
        ("# Automatically generated, DO NOT EDIT\n" + CODE, "generated"),
        (CODE + "x" * 501, "minified"),
        (CODE.replace(" ", "").replace("\n", ";") * 2, "minified"),
        ("table = [\n" + "    0x0f, 0xff, 12,\n" * 50 + "]\n", "few letters"),
    ],
)
def test_files_that_are_no_code_to_learn_from_are_told(text: str, flaw: str | None) -> None:
    assert code_reject_reason(text) == flaw


def test_a_licence_that_was_seen_before_is_cut_off() -> None:
    known: set[str] = set()
    first = strip_repeated_license("# Copyright 2020 Somebody.\n# All rights reserved.\n\nimport a\n", known)
    second = strip_repeated_license("// Copyright 2024 Somebody.\n// All rights reserved.\n#include <b.h>\n", known)
    assert first.startswith("# Copyright")
    assert second == "#include <b.h>\n"
