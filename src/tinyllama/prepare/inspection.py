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
from tinyllama.files import read_json, read_regular_file, sha256_of
from tinyllama.formatting import format_table
from tinyllama.prepare.pipeline import settings_diff
from tinyllama.prepare.store_warnings import TAIL_HELD_OUT, file_warning_lines, holdout_remedy
from tinyllama.progress import BYTES, Bar
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer

_EXCERPT_CHARACTERS = 240
_MAX_REASONS = 20
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


def inspect_lines(
    folder: Path, recipe: str | None, step: int | None, row: int | None, tokenizer: str | None
) -> Iterator[str]:
    """Yield the output of `tinyllama inspect`: a store's description, or the provenance of one row of a training step.

    If `row` is None, row 0 is traced. Raises InputError if only one of `recipe` and `step` is given, if `row` is given
    without both, or if a file of the store is invalid.
    """
    if (recipe is None) != (step is None) or (row is not None and step is None):
        raise InputError("inspect: to trace a row, give both --recipe and --step")
    store = TokenStore.open(folder)
    with translate_damage_errors(folder):
        found = open_tokenizer(store, tokenizer)
        if recipe is not None and step is not None:
            yield from trace_row(store, Recipe.load(recipe), step, row or 0, found)
        else:
            yield from describe(store, found)
        if found is None:
            place = store.manifest["tokenizer"]["path"]
            yield f"no text shown: the store's tokenizer is no longer at {place}; give its path with --tokenizer"


def prepared_lines(store: TokenStore) -> Iterator[str]:
    """Yield the output of `tinyllama prepare`: counts, dropped rows, skipped files and suspect files."""
    manifest = store.manifest
    for name, split in store.splits.items():
        rows = split.manifest["rows"]
        yield f"{store.folder}/{name}: {split.num_tokens:,} tokens in {split.num_documents:,} documents"
        for what, reasons in (("dropped", rows["dropped"]), ("changed", rows.get("changed", {}))):
            for reason, count in reasons.items():
                yield f"    {what}: {count:,} rows, {reason}"
    yield from _skipped_files(manifest)
    for name in manifest["sources"] if manifest["validation_fraction"] else ():
        split_name = f"{name}/validation"
        if split_name not in store or not store[split_name].num_documents:
            yield f"{name}: nothing is held out for validation; {holdout_remedy(store, name)}"
    yield from file_warning_lines(manifest)


def describe(store: TokenStore, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield the lines that describe a store, with sample documents if the tokenizer is available."""
    manifest = store.manifest
    tokens = sum(split.num_tokens for split in store.splits.values())
    documents = sum(split.num_documents for split in store.splits.values())
    files, size = len(manifest["inputs"]), sum(manifest["inputs"].values())
    yield f"{store.folder}: {tokens:,} tokens ({manifest['dtype']}) in {documents:,} documents"
    yield f"made from {files:,} files of {size / 1e6:,.1f} MB; manifest {store.digest}"
    vocabulary, special_tokens = manifest["tokenizer"], manifest["document"]
    added = " and ".join(name.upper() for name in ("bos", "eos") if special_tokens[name]) or "no special tokens"
    yield f"tokenizer {vocabulary['digest'][:12]}, vocabulary size {vocabulary['vocab_size']:,}; documents with {added}"
    yield ""
    head = ("split", "documents", "tokens", "share", "bytes per token")
    yield from format_table(head, _table_rows(store, tokens), right=head[1:])
    for name, split in store.splits.items():
        rows = split.manifest["rows"]
        yield ""
        yield f"{name}: {rows['read']:,} rows read, {rows['kept']:,} kept"
        for reason, count in sorted(rows["dropped"].items(), key=lambda item: -item[1]):
            yield f"  {count:>12,}  dropped: {reason}"
        for reason, count in rows.get("changed", {}).items():
            yield f"  {count:>12,}  changed: {reason}"
        if (split.folder / "rejects.jsonl").stat().st_size:
            yield f"  rejected rows are listed in {split.folder / 'rejects.jsonl'}"
    yield from _skipped_files(manifest)
    yield from file_warning_lines(manifest)
    for source, fields in manifest["sources"].items():
        for task, found in fields.get("contamination", {}).items():
            counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in found.items())
            yield f"{source}: overlap with {task}: {counts}"
    if tokenizer:
        yield from _samples(store, tokenizer)


def _table_rows(store: TokenStore, total: int) -> Iterator[list[str]]:
    """Yield a table row for each split, followed by a row for each of the split's subsets."""
    for name, split in store.splits.items():
        manifest = split.manifest
        yield _table_row(name, manifest, total)
        if set(manifest["subsets"]) != {""}:
            for subset, counts in sorted(manifest["subsets"].items(), key=lambda item: -item[1]["tokens"]):
                yield _table_row(f"  {subset or '(none)'}", counts, manifest["tokens"])


def _table_row(name: str, counts: dict[str, Any], total: int) -> list[str]:
    tokens = counts["tokens"]
    share = f"{100 * tokens / total:.2f} %" if total else ""
    bytes_per_token = f"{counts['text_bytes'] / tokens:.3f}" if tokens else ""
    return [name, f"{counts['documents']:,}", f"{tokens:,}", share, bytes_per_token]


def _skipped_files(manifest: dict[str, Any]) -> Iterator[str]:
    for source, fields in manifest["sources"].items():
        by_count = sorted(fields["skipped_files"].items(), key=lambda item: -item[1])
        for reason, count in by_count[:_MAX_REASONS]:
            yield f"{source}: {count:,} file{'s' * (count != 1)} not read, {reason}"
        if more := sum(count for _, count in by_count[_MAX_REASONS:]):
            yield f"{source}: {more:,} more files not read, listed in the store's manifest.json"


def _samples(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of the first, the middle and the last document of each split."""
    for name, split in store.splits.items():
        source, _, kind = name.partition("/")
        has_tails = kind == "validation" and TAIL_HELD_OUT in store[f"{source}/train"].manifest["rows"].get(
            "changed", {}
        )
        count = split.num_documents
        for document in split.find_documents(sorted({0, count // 2, count - 1} if count else ())):
            yield ""
            place = f"{document.file} row {document.row}" + (", its end" if has_tails else "")
            yield f"{name}, document {document.number:,}: {document.tokens:,} tokens, {place}"
            # Nearly every token has at least one character, so one token more than the excerpt's characters is enough.
            stop = document.start + min(document.tokens, _EXCERPT_CHARACTERS + 1)
            yield f"  {_excerpt(tokenizer, split.read(document.start, stop))}"


def trace_row(store: TokenStore, recipe: Recipe, step: int, row: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield lines that list the documents in a row of a training step, from the row's first token to its last target.

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
    yield f"step {step} (step {step + 1} in metrics.jsonl), row {row}: sequence {index:,} of {name}, epoch {epoch}"
    yield f"  tokens {start:,} to {stop - 1:,} of the split"
    for document in split.documents_between(start, stop):
        first, last = max(start, document.start), min(stop, document.start + document.tokens)
        yield (
            f"  tokens {first - start} to {last - start - 1}: document {document.number:,}, "
            f"from its token {first - document.start} of {document.tokens:,}"
        )
        yield f"    {document.file} row {document.row}, file's sha256 {document.sha256}"
        if tokenizer:
            yield f"    {_excerpt(tokenizer, split.read(first, last))}"


def _excerpt(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    """Return the beginning of the decoded text of tokens, in quotes."""
    text = tokenizer.decode(tokens[:_EXCERPT_CHARACTERS].tolist())
    is_complete = len(tokens) <= _EXCERPT_CHARACTERS and len(text) <= _EXCERPT_CHARACTERS
    return repr(text[:_EXCERPT_CHARACTERS]) + ("" if is_complete else "…")


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
