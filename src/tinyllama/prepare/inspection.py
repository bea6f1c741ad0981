"""Inspection of a token store: counts, dropped rows and their reasons, samples, a row's provenance, and verification.

The description reads the manifests and only the displayed parts of the shards. The verification reads every byte and
detects any changed bit: `manifest.sha256` has the hash of the manifest, the manifest has the hashes of the splits'
manifests, and the splits' manifests have the hashes of the shards.
"""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tinyllama.data.order import sequences
from tinyllama.data.store import HASH_KEYS, TokenStore
from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.files import numbered_rows, read_json, read_regular_file, sha256_of
from tinyllama.formatting import echo, format_table
from tinyllama.prepare.pipeline import settings_diff
from tinyllama.prepare.store_warnings import TAIL_HELD_OUT, file_warning_lines, holdout_remedy
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe
from tinyllama.runs.listing import recipe_fields
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer

_EXCERPT_CHARACTERS = 240
_MAX_REASONS = 20
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


def resolve_store(path: Path) -> tuple[Path, str | None]:
    """Return the store at a path, or the store and the recipe's path of the run or the recipe at the path.

    Warns if the run's store has changed since the run was trained. Raises InputError if the run's store is missing, or
    if the run's recipe names none.
    """
    if path.is_file():
        recipe = Recipe.load(path)
        if problem := TokenStore.problem(recipe.data.store):
            raise InputError(f"{recipe.data.store}: the token store {problem}; run: {recipe.command('prepare')}")
        return Path(recipe.data.store), str(path)
    run = RunDir(path)
    if TokenStore.exists(path) or not run.recipe_path.is_file():
        return path, None
    data = recipe_fields(run).get("data")
    if not isinstance(data, dict) or not isinstance(data.get("store"), str):
        raise InputError(f"{run.recipe_path}: no data.store; give the store's folder")
    store = Path(data["store"])
    if not store.is_dir():
        remedy = "run this in the folder in which training was started, or give the store's folder"
        raise InputError(f"{path}: the store of this run, {store}, is not here; {remedy}")
    manifest = store / "manifest.json"
    if run.store_manifest_path.is_file() and manifest.is_file():
        then, now = sha256_of(run.store_manifest_path), sha256_of(manifest)
        if then != now:
            hashes = f"manifest's sha256 {now[:12]}, not {then[:12]}"
            echo(f"{store}: another store than the one {path} was trained on ({hashes})", to_stderr=True)
    return store, str(run.recipe_path)


def inspect_store(
    folder: Path, recipe: str | None, step: int | None, row: int | None, tokenizer: str | None, samples: int
) -> dict[str, Any]:
    """Return a store's description with `samples` documents per source, or the provenance of a row of a training step.

    The keys are those of `tinyllama inspect --json`. If `row` is None, row 0 is traced. Raises InputError if only one
    of `recipe` and `step` is given, if `row` is given without both, if `samples` is negative, or if a file of the store
    is invalid.
    """
    if (recipe is None) != (step is None) or (row is not None and step is None):
        raise InputError("inspect: to trace a row, give both --recipe and --step; for a run, --step is enough")
    if samples < 0:
        raise InputError(f"--samples {samples}: out of range; give 0 or more documents per source")
    store = TokenStore.open(folder)
    with translate_damage_errors(folder):
        found = open_tokenizer(store, tokenizer)
        if recipe is not None and step is not None:
            result = trace_row(store, Recipe.load(recipe), step, row or 0, found)
        else:
            result = describe(store, found, samples)
        return result | {"has_text": found is not None, "tokenizer_path": store.manifest["tokenizer"]["path"]}


def inspection_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the output of `tinyllama inspect` for a result of `inspect_store`.

    Raises InputError if a value in the store's manifests has a wrong type.
    """
    with translate_damage_errors(Path(result["store"])):
        yield from _trace_lines(result) if "step" in result else _description_lines(result)
    if not result["has_text"]:
        place = result["tokenizer_path"]
        yield f"no text shown: the store's tokenizer is no longer at {place}; give its path with --tokenizer"


def duplicate_lines(folder: Path) -> Iterator[str]:
    """Yield a line for each listed duplicate, and the number of other duplicates."""
    unlisted = total = count_duplicates(folder)
    for one in list_duplicates(folder):
        yield f"{one['file']} row {one['row']}: {one['reason']} of {one['kept_file']} row {one['kept_row']}"
        unlisted -= 1
    if not total:
        yield f"{folder}: deduplication dropped no documents"
    elif unlisted:
        yield f"{unlisted:,} more duplicates are only counted"


def count_duplicates(folder: Path) -> int:
    """Return the number of documents that deduplication dropped."""
    dropped = (split.manifest["rows"]["dropped"] for split in TokenStore.open(folder).splits.values())
    return sum(count for rows in dropped for reason, count in rows.items() if reason.startswith("duplicate ("))


def list_duplicates(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each listed document that deduplication dropped, with the kept document; the keys are those of `--json`.

    A task's list has a maximum size, so some duplicates are only counted. Raises InputError if a file of the store is
    invalid.
    """
    store = TokenStore.open(folder)
    with translate_damage_errors(folder):
        for name, split in store.splits.items():
            for _, row in numbered_rows(split.folder / "rejects.jsonl"):
                if kept := row.get("kept"):
                    duplicate = {key: row[key] for key in ("file", "row", "reason")}
                    yield {"split": name} | duplicate | {"kept_file": kept["file"], "kept_row": kept["row"]}


def prepared_lines(store: TokenStore) -> Iterator[str]:
    """Yield the output of `tinyllama prepare`: counts, dropped rows, skipped files and suspect files."""
    manifest = store.manifest
    for name, split in store.splits.items():
        rows = split.manifest["rows"]
        yield f"{store.folder}/{name}: {split.num_tokens:,} tokens in {split.num_documents:,} documents"
        for what, reasons in (("dropped", rows["dropped"]), ("changed", rows.get("changed", {}))):
            for reason, count in reasons.items():
                yield f"    {what}: {count:,} rows, {reason}"
    yield from _skipped_files({name: fields["skipped_files"] for name, fields in manifest["sources"].items()})
    for name in manifest["sources"] if manifest["validation_fraction"] else ():
        split_name = f"{name}/validation"
        if split_name not in store or not store[split_name].num_documents:
            yield f"{name}: nothing is held out for validation; {holdout_remedy(store, name)}"
    yield from file_warning_lines(manifest)


def describe(store: TokenStore, tokenizer: Tokenizer | None, samples: int) -> dict[str, Any]:
    """Return the description of a store, with sample documents if the tokenizer is available."""
    manifest, splits = store.manifest, {name: split.manifest for name, split in store.splits.items()}
    return {
        "store": str(store.folder),
        "manifest_sha256": store.digest,
        "tokens": sum(split["tokens"] for split in splits.values()),
        "documents": sum(split["documents"] for split in splits.values()),
        "dtype": manifest["dtype"],
        "files": len(manifest["inputs"]),
        "file_bytes": sum(manifest["inputs"].values()),
        "tokenizer_sha256": manifest["tokenizer"]["digest"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "document": manifest["document"],
        "splits": {
            name: {key: split[key] for key in ("documents", "tokens", "text_bytes", "subsets")}
            | {"rows": {"changed": {}} | split["rows"], "rejects": _rejects(store, name)}
            for name, split in splits.items()
        },
        "skipped_files": {name: source["skipped_files"] for name, source in manifest["sources"].items()},
        "contamination": {name: source.get("contamination", {}) for name, source in manifest["sources"].items()},
        "warnings": list(file_warning_lines(manifest)),
        "samples": list(_samples(store, tokenizer, samples)) if tokenizer is not None else [],
    }


def _rejects(store: TokenStore, split: str) -> str | None:
    """Return the path of the file that lists a split's rejected rows, or None if no row was rejected."""
    path = store[split].folder / "rejects.jsonl"
    return str(path) if path.stat().st_size else None


def _description_lines(result: dict[str, Any]) -> Iterator[str]:
    tokens = result["tokens"]
    yield f"{result['store']}: {tokens:,} tokens ({result['dtype']}) in {result['documents']:,} documents"
    size = f"{result['files']:,} files of {result['file_bytes'] / 1e6:,.1f} MB"
    yield f"made from {size}; manifest {result['manifest_sha256'][:12]}"
    added = " and ".join(name.upper() for name in ("bos", "eos") if result["document"][name]) or "no special tokens"
    vocabulary = f"tokenizer {result['tokenizer_sha256'][:12]}, vocabulary size {result['vocab_size']:,}"
    yield f"{vocabulary}; documents with {added}"
    yield ""
    head = ("split", "documents", "tokens", "share", "bytes per token")
    yield from format_table(head, _table_rows(result["splits"], tokens), right=head[1:])
    for name, split in result["splits"].items():
        rows = split["rows"]
        yield ""
        yield f"{name}: {rows['read']:,} rows read, {rows['kept']:,} kept"
        for reason, count in sorted(rows["dropped"].items(), key=lambda item: -item[1]):
            yield f"  {count:>12,}  dropped: {reason}"
        for reason, count in rows["changed"].items():
            yield f"  {count:>12,}  changed: {reason}"
        if split["rejects"]:
            yield f"  rejected rows and duplicates are listed in {split['rejects']}"
    yield from _skipped_files(result["skipped_files"])
    yield from result["warnings"]
    for source, tasks in result["contamination"].items():
        for task, found in tasks.items():
            counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in found.items())
            yield f"{source}: overlap with {task}: {counts}"
    for one in result["samples"]:
        yield ""
        place = f"{one['file']} row {one['row']}" + (", its end" if one["is_end"] else "")
        yield f"{one['split']}, document {one['document']:,}: {one['tokens']:,} tokens, {place}"
        yield f"  {_quoted(one)}"


def _table_rows(splits: dict[str, Any], total: int) -> Iterator[list[str]]:
    """Yield a table row for each split, followed by a row for each of the split's subsets."""
    for name, split in splits.items():
        yield _table_row(name, split, total)
        if set(split["subsets"]) != {""}:
            for subset, counts in sorted(split["subsets"].items(), key=lambda item: -item[1]["tokens"]):
                yield _table_row(f"  {subset or '(none)'}", counts, split["tokens"])


def _table_row(name: str, counts: dict[str, Any], total: int) -> list[str]:
    tokens = counts["tokens"]
    share = f"{100 * tokens / total:.2f} %" if total else ""
    bytes_per_token = f"{counts['text_bytes'] / tokens:.3f}" if tokens else ""
    return [name, f"{counts['documents']:,}", f"{tokens:,}", share, bytes_per_token]


def _skipped_files(by_source: dict[str, dict[str, int]]) -> Iterator[str]:
    for source, reasons in by_source.items():
        by_count = sorted(reasons.items(), key=lambda item: -item[1])
        for reason, count in by_count[:_MAX_REASONS]:
            yield f"{source}: {count:,} file{'s' * (count != 1)} not read, {reason}"
        if more := sum(count for _, count in by_count[_MAX_REASONS:]):
            yield f"{source}: {more:,} more files not read, listed in the store's manifest.json"


def _samples(store: TokenStore, tokenizer: Tokenizer, count: int) -> Iterator[dict[str, Any]]:
    """Yield the beginnings of `count` documents of each source, spread evenly over its splits."""
    for source in store.manifest["sources"]:
        names = [name for name in store.splits if name.partition("/")[0] == source]
        total = sum(store[name].num_documents for name in names)
        wanted = {place * (total - 1) // max(1, count - 1) for place in range(count)} if total else set()
        first = 0
        for name in names:
            own = sorted(number - first for number in wanted if 0 <= number - first < store[name].num_documents)
            first += store[name].num_documents
            changed = store[f"{source}/train"].manifest["rows"].get("changed", {})
            is_end = name.endswith("/validation") and TAIL_HELD_OUT in changed
            for document in store[name].find_documents(own):
                # Nearly every token has at least one character, so one token more than the characters is enough.
                stop = document.start + min(document.tokens, _EXCERPT_CHARACTERS + 1)
                place = {"file": document.file, "row": document.row, "is_end": is_end, "tokens": document.tokens}
                excerpt = _excerpt(tokenizer, store[name].read(document.start, stop))
                yield {"split": name, "document": document.number} | place | excerpt


def trace_row(store: TokenStore, recipe: Recipe, step: int, row: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the documents in a row of a training step, from the row's first token to its last target.

    Steps are counted from 0, as in `sequences`; metrics.jsonl lists the result of step s as step s + 1. Rows are
    counted from 0. Raises InputError if the row does not exist, or if the recipe belongs to another store.
    """
    for key, (made_with, wanted) in settings_diff(store.manifest, recipe):
        raise InputError(
            f"{store.folder}: made with {key} {made_with}, but the recipe has {wanted}; give the recipe of this store"
        )
    batch, length = recipe.train.batch_sequences, recipe.train.sequence_length
    if not 0 <= step < recipe.train.steps:
        raise InputError(f"--step {step}: the recipe's steps are 0 to {recipe.train.steps - 1}; choose one of them")
    if not 0 <= row < batch:
        raise InputError(f"--row {row}: the rows of a step are 0 to {batch - 1}; choose one of them")
    source, epoch, index = (int(number) for number in sequences(recipe, store, step)[row])
    name = f"{list(recipe.data.sources)[source]}/train"
    split, start, stop = store[name], index * length, (index + 1) * length + 1
    documents = []
    for document in split.documents_between(start, stop):
        first, last = max(start, document.start), min(stop, document.start + document.tokens)
        place = {"document": document.number, "file": document.file, "row": document.row, "sha256": document.sha256}
        tokens = {"first": first - start, "last": last - start - 1, "document_first": first - document.start}
        excerpt = _excerpt(tokenizer, split.read(first, last)) if tokenizer is not None else {}
        documents.append(place | tokens | {"document_tokens": document.tokens} | excerpt)
    position = {"split": name, "epoch": epoch, "sequence": index, "first_token": start, "last_token": stop - 1}
    return {"store": str(store.folder), "step": step, "row": row} | position | {"documents": documents}


def _trace_lines(result: dict[str, Any]) -> Iterator[str]:
    step, sequence = result["step"], f"sequence {result['sequence']:,} of {result['split']}, epoch {result['epoch']}"
    yield f"step {step} (step {step + 1} in metrics.jsonl), row {result['row']}: {sequence}"
    yield f"  tokens {result['first_token']:,} to {result['last_token']:,} of the split"
    for one in result["documents"]:
        part = f"from its token {one['document_first']} of {one['document_tokens']:,}"
        yield f"  tokens {one['first']} to {one['last']}: document {one['document']:,}, {part}"
        yield f"    {one['file']} row {one['row']}, file's sha256 {one['sha256'][:12]}"
        if "text" in one:
            yield f"    {_quoted(one)}"


def _excerpt(tokenizer: Tokenizer, tokens: NDArray[Any]) -> dict[str, Any]:
    """Return the beginning of the decoded text of tokens, and whether it is the complete text."""
    text = tokenizer.decode(tokens[:_EXCERPT_CHARACTERS].tolist())
    is_complete = len(tokens) <= _EXCERPT_CHARACTERS and len(text) <= _EXCERPT_CHARACTERS
    return {"text": text[:_EXCERPT_CHARACTERS], "is_complete": is_complete}


def _quoted(excerpt: dict[str, Any]) -> str:
    return repr(excerpt["text"]) + ("" if excerpt["is_complete"] else "…")


def open_tokenizer(store: TokenStore, path: str | None) -> Tokenizer | None:
    """Return the tokenizer of a store, from `path` or, without `path`, from the tokenizer's original folder.

    Returns None if the original folder no longer has the tokenizer. Raises InputError if `path` does not have it.
    """
    made_with = store.manifest["tokenizer"]
    if path is None and not Path(made_with["path"]).exists():
        return None
    tokenizer = Tokenizer.load(path or made_with["path"])
    if tokenizer.digest == made_with["digest"]:
        return tokenizer
    if path is None:
        return None
    raise InputError(f"{path}: not the tokenizer that {store.folder} was made with; give the original tokenizer")


def find_corruption(store: Path) -> list[str]:
    """Return one line for each file of a store that is changed, truncated, missing or unexpected.

    Raises InputError if `store` is not a finished store.
    """
    if not any((store / name).is_file() for name in ("manifest.json", "manifest.sha256")):
        raise InputError(f"{store}: no finished token store here; run `tinyllama prepare` with its recipe")
    manifest, problems = _read_manifest(store)
    try:
        expected, unreadable = _expected_hashes(store, manifest)
    except _MALFORMED:
        return [*problems, f"{store / 'manifest.json'} cannot be used; no other file was checked"]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in expected]
    with Bar("verifying", sum(sizes), BYTES, where=f"every byte of {store} is read") as bar:
        for (path, sha256), done in zip(expected.items(), accumulate(sizes), strict=True):
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif sha256_of(path) != sha256:
                problems.append(f"{path} does not match its hash")
            bar.show(done)
    known = expected.keys() | {store / "manifest.json", store / "manifest.sha256"}
    folders = {folder for path in known for folder in path.parents}
    unexpected = (path for path in sorted(store.rglob("*")) if path not in known | folders)
    return problems + [f"{path} is unexpected" for path in unexpected if path.parent not in unreadable]


def _read_manifest(store: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the store's manifest and its problems; the manifest is empty if it is not readable."""
    path, hash_file = store / "manifest.json", store / "manifest.sha256"
    if not path.is_file():
        return {}, [f"{path} is missing"]
    problems = []
    try:
        if not hash_file.is_file():
            problems = [f"{hash_file} is missing"]
        elif read_regular_file(hash_file) != f"{sha256_of(path)}  {path.name}\n".encode():
            problems = [f"{path} does not match its hash in {hash_file.name}"]
    except InputError as error:
        problems = [str(error)]
    try:
        return read_json(path), problems
    except InputError as error:
        return {}, [*problems, str(error)]


def _expected_hashes(store: Path, manifest: dict[str, Any]) -> tuple[dict[Path, str], set[Path]]:
    """Return the SHA-256 of each file that the manifests list, and the folders of splits with unreadable manifests."""
    expected: dict[Path, str] = {}
    unreadable: set[Path] = set()
    for source, fields in manifest["sources"].items():
        for split, entry in fields["splits"].items():
            folder = store / source / split
            expected[folder / "manifest.json"] = entry["manifest_sha256"]
            try:
                own = read_json(folder / "manifest.json")
                files = {folder / "rejects.jsonl": own["rejects_sha256"]}
                for shard in own["shards"]:
                    path = folder / shard["file"]
                    files |= {path.with_suffix(suffix): shard[key] for suffix, key in HASH_KEYS.items()}
                expected |= files
            except (OSError, *_MALFORMED):
                unreadable.add(folder)
    return expected, unreadable
