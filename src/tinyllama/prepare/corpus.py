"""The embedded corpus: real text that every Python machine has, in the schemas of SlimPajama and Starcoderdata.

Reads the standard library and the installed distributions; writes DIR/slimpajama, DIR/starcoderdata, and
DIR/tinyllama-corpus.json, which lists them. At least 15 MB of prose and 25 MB of code with this project's own
dependencies; the same packages give the same bytes, so a run on them can be repeated elsewhere.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import zstandard

from tinyllama.errors import InputError
from tinyllama.files import atomic_write, read_json, sha256_of, write_json
from tinyllama.prepare.corpus_documents import GITHUB, SUFFIXES, Document, code_documents, prose_documents
from tinyllama.prepare.corpus_files import source_files
from tinyllama.progress import Bar

FOLDERS = ("slimpajama", "starcoderdata")
MANIFEST = "tinyllama-corpus.json"
STAGING_DIR = ".tinyllama-corpus.part"
JSONL_SHARD_CHARACTERS, PARQUET_SHARD_CHARACTERS = 5_000_000, 8_000_000
STARCODERDATA_SCHEMA = pa.schema(
    [
        ("max_stars_repo_path", pa.string()),
        ("max_stars_repo_name", pa.string()),
        ("max_stars_count", pa.int64()),
        ("id", pa.string()),
        ("content", pa.string()),
    ]
)


@dataclass(frozen=True)
class PartSize:
    """How much one set of SlimPajama or one language of Starcoderdata holds."""

    documents: int
    bytes: int


@dataclass(frozen=True)
class CorpusReport:
    """What was written, by SlimPajama's set and by language, and how much was not, by kind and reason."""

    prose: dict[str, PartSize]
    code: dict[str, PartSize]
    left_out: dict[str, int]

    def by_folder(self) -> dict[str, dict[str, PartSize]]:
        """The parts that each of FOLDERS has got."""
        return dict(zip(FOLDERS, (self.prose, self.code), strict=True))


def write_corpus(directory: Path) -> CorpusReport:
    """Write DIR/slimpajama (a train split only) and DIR/starcoderdata, in place of those of a former run.

    No text is in both: a file gives either itself, to code, or its docstrings and comments, to prose; and a paragraph
    whose first and last eight words are found in the code is left out. Takes half a minute. Raises InputError where the
    directory cannot be written, or the two folders hold files of another origin.
    """
    check_only_own_files(directory)
    stage = create_staging_dir(directory)
    left_out: Counter[str] = Counter()
    with Bar("the corpus", 4, "parts", rate="", where=f"it will be {directory}") as bar:
        bar.show(0, "reading code")
        files = source_files(SUFFIXES, left_out)
        source_code = list(code_documents(files, left_out))
        github = [document for document in source_code if document.part == GITHUB]
        code = [document for document in source_code if document.part != GITHUB]
        bar.show(1, "reading prose")
        prose = [*github, *prose_documents(files, source_code, left_out)]
        bar.show(2, "writing prose")
        write_slimpajama(stage / "slimpajama", prose)
        bar.show(3, "writing code")
        write_starcoderdata(stage / "starcoderdata", code)
        bar.show(4)
    report = CorpusReport(part_sizes(prose), part_sizes(code), dict(sorted(left_out.items())))
    install(stage, directory, report)
    return report


def part_sizes(documents: list[Document]) -> dict[str, PartSize]:
    """Documents and bytes of each part, the largest first."""
    num_documents = Counter(document.part for document in documents)
    num_bytes: Counter[str] = Counter()
    for document in documents:
        num_bytes[document.part] += len(document.text.encode())
    return {part: PartSize(num_documents[part], size) for part, size in num_bytes.most_common()}


def write_slimpajama(folder: Path, documents: list[Document]) -> None:
    """Write train/chunk1/example_train_N.jsonl.zst with rows {"text", "meta": {"redpajama_set_name"}}."""
    for number, shard in enumerate(shards(documents, JSONL_SHARD_CHARACTERS)):
        rows = ({"text": row.text, "meta": {"redpajama_set_name": row.part}} for row in shard)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with atomic_write(folder / "train" / "chunk1" / f"example_train_{number}.jsonl.zst") as file:
            file.write(zstandard.compress(lines.encode(), 3))


def write_starcoderdata(folder: Path, documents: list[Document]) -> None:
    """Write <language>/train-N-of-M.parquet; a row's id is the beginning of its content's SHA-256."""
    for language in sorted({document.part for document in documents}):
        tables = shards([row for row in documents if row.part == language], PARQUET_SHARD_CHARACTERS)
        for number, shard in enumerate(tables):
            rows = [(row.name, row.repository, 0, sha256_of_text(row.text)[:16], row.text) for row in shard]
            columns = dict(zip(STARCODERDATA_SCHEMA.names, zip(*rows, strict=True), strict=True))
            name = f"train-{number:05}-of-{len(tables):05}.parquet"
            with atomic_write(folder / language / name) as file:
                pa.parquet.write_table(pa.table(columns, STARCODERDATA_SCHEMA), file)


def shards(documents: list[Document], shard_characters: int) -> list[list[Document]]:
    """The documents in the order of their SHA-256, which mixes their kinds, cut into lists of about one size."""
    lists: list[list[Document]] = []
    size = shard_characters
    for document in sorted(documents, key=lambda document: sha256_of_text(document.text)):
        if size >= shard_characters:
            lists.append([])
            size = 0
        lists[-1].append(document)
        size += len(document.text)
    return lists


def sha256_of_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_only_own_files(directory: Path) -> None:
    """Let only those files be replaced that a former run wrote and nobody changed since, by its manifest."""
    manifest = directory / MANIFEST
    written = read_json(manifest)["files"] if manifest.exists() else {}
    for folder in (directory / name for name in FOLDERS):
        for path in sorted([folder, *folder.rglob("*")]):
            if path.is_file() and sha256_of(path) != written.get(path.relative_to(directory).as_posix()):
                raise InputError(f"{path}: not written by the corpus command; move it away or give another directory")


def create_staging_dir(directory: Path) -> Path:
    """Make the folder in which the new corpus grows; what a killed run left there goes."""
    stage = directory / STAGING_DIR
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); give another directory") from error
    return stage


def install(stage: Path, directory: Path, report: CorpusReport) -> None:
    """Put the new folders in the place of the old ones, each whole.

    The manifest is written when the old are gone and the new not yet there, so that a run killed anywhere in
    between leaves no file that the next run would take for a stranger's.
    """
    files = {path.relative_to(stage).as_posix(): sha256_of(path) for path in sorted(stage.rglob("*")) if path.is_file()}
    for name in FOLDERS:
        if (directory / name).exists():
            (directory / name).rename(stage / f"former-{name}")
    write_json(directory / MANIFEST, {"files": files, **asdict(report)})
    for name in FOLDERS:
        (stage / name).rename(directory / name)
    shutil.rmtree(stage)
