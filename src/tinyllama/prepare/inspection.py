"""What a token store holds, in words: tokens, documents, shares, what was left out and why, decoded samples.

And the way back: from a sequence of a training step to its documents, their input file and row. Reads the manifests,
and of the shards only what it shows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tinyllama.data.order import sequences
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.prepare.manifests import settings_diff
from tinyllama.prepare.store_warnings import TAIL_HELD_OUT, file_warning_lines, holdout_remedy
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer

_EXCERPT_CHARACTERS = 240
_MOST_REASONS = 20


def inspect_lines(
    folder: Path, recipe: str | None, step: int | None, row: int | None, tokenizer: str | None
) -> Iterator[str]:
    """What `tinyllama inspect` prints: a store's description, or where a row of a recipe's step comes from."""
    if (recipe is None) != (step is None) or (row is not None and step is None):
        raise InputError("inspect: a row is traced by --recipe, --step and --row together; add what is missing")
    store = TokenStore.open(folder)
    found = tokenizer_of(store, tokenizer)
    if recipe is not None and step is not None:
        yield from trace_row(store, Recipe.load(recipe), step, row or 0, found)
    else:
        yield from describe(store, found)
    if found is None:
        place = store.manifest["tokenizer"]["path"]
        yield f"no text shown: the store's tokenizer is no longer at {place}; name it by --tokenizer"


def prepared_lines(store: TokenStore) -> Iterator[str]:
    """What `tinyllama prepare` prints of a finished store: what it holds, what not, and what should be looked at."""
    manifest = store.manifest
    for name, split in store.splits.items():
        rows = split.manifest["rows"]
        yield f"{store.folder}/{name}: {split.num_tokens:,} tokens in {split.num_documents:,} documents"
        for what, reasons in (("left out", rows["left_out"]), ("changed", rows.get("changed", {}))):
            for reason, count in reasons.items():
                yield f"    {what}: {count:,} rows, {reason}"
    yield from _files_left_out(manifest)
    for name in manifest["sources"] if manifest["validation_fraction"] else ():
        held_out = f"{name}/validation"
        if held_out not in store or not store[held_out].num_documents:
            yield f"{name}: nothing is held out for validation; {holdout_remedy(store, name)}"
    yield from file_warning_lines(manifest)


def describe(store: TokenStore, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Lines that say what a store holds; with its tokenizer, sample documents too."""
    manifest = store.manifest
    tokens = sum(split.num_tokens for split in store.splits.values())
    documents = sum(split.num_documents for split in store.splits.values())
    files, size = len(manifest["inputs"]), sum(manifest["inputs"].values())
    yield f"{store.folder}: {tokens:,} tokens ({manifest['dtype']}) in {documents:,} documents"
    yield f"made from {files:,} files of {size / 1e6:,.1f} MB; manifest {store.digest}"
    vocabulary, markers = manifest["tokenizer"], manifest["document"]
    marked = " and ".join(name for name in ("bos", "eos") if markers[name]) or "no"
    yield f"tokenizer of {vocabulary['vocab_size']:,} pieces, {vocabulary['digest'][:12]}; {marked} markers"
    yield ""
    yield from _table(store, tokens)
    yield from _left_out(store)
    yield from _files_left_out(manifest)
    yield from file_warning_lines(manifest)
    yield from _contamination(manifest)
    if tokenizer:
        yield from _samples(store, tokenizer)


def _table(store: TokenStore, total: int) -> Iterator[str]:
    yield f"{'':34}{'documents':>14}{'tokens':>18}{'share':>9}{'bytes a token':>15}"
    for name, split in store.splits.items():
        manifest = split.manifest
        yield _line(name, manifest, total)
        subsets = manifest["subsets"]
        if set(subsets) != {""}:
            for subset, tally in sorted(subsets.items(), key=lambda item: -item[1]["tokens"]):
                yield _line(f"  {subset or '(none)'}", tally, manifest["tokens"])


def _line(name: str, tally: dict[str, Any], total: int) -> str:
    tokens = tally["tokens"]
    share = f"{100 * tokens / total:.2f} %" if total else ""
    ratio = f"{tally['text_bytes'] / tokens:.3f}" if tokens else ""
    return f"{name:34}{tally['documents']:>14,}{tokens:>18,}{share:>9}{ratio:>15}"


def _left_out(store: TokenStore) -> Iterator[str]:
    for name, split in store.splits.items():
        rows = split.manifest["rows"]
        yield ""
        yield f"{name}: {rows['read']:,} rows read, {rows['kept']:,} kept"
        for reason, count in sorted(rows["left_out"].items(), key=lambda item: -item[1]):
            yield f"  {count:>12,}  {reason}"
        for reason, count in rows.get("changed", {}).items():
            yield f"  {count:>12,}  kept, but {reason}"
        if (split.folder / "rejects.jsonl").stat().st_size:
            yield f"  rows at fault are listed in {split.folder / 'rejects.jsonl'}"


def _files_left_out(manifest: dict[str, Any]) -> Iterator[str]:
    for source, fields in manifest["sources"].items():
        by_count = sorted(fields["files_left_out"].items(), key=lambda item: -item[1])
        for reason, count in by_count[:_MOST_REASONS]:
            yield f"{source}: {count:,} file{'s' * (count != 1)} not read, {reason}"
        if more := sum(count for _, count in by_count[_MOST_REASONS:]):
            yield f"{source}: {more:,} more files not read, listed in the store's manifest.json"


def _contamination(manifest: dict[str, Any]) -> Iterator[str]:
    for source, fields in manifest["sources"].items():
        for task, found in fields.get("contamination", {}).items():
            words = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in found.items())
            yield f"{source}: overlap with {task}: {words}"


def _samples(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """The first, a middle and the last document of each split, by their beginnings."""
    for name, split in store.splits.items():
        count, part = split.num_documents, ", its end" if _holds_ends(store, name) else ""
        for document in split.find_documents(sorted({0, count // 2, count - 1} if count else ())):
            yield ""
            place = f"{document.file} row {document.row}{part}"
            yield f"{name}, document {document.number:,}: {document.tokens:,} tokens, {place}"
            stop = document.start + min(document.tokens, _EXCERPT_CHARACTERS + 1)  # a token has a character at least
            yield f"  {_excerpt(tokenizer, split.read(document.start, stop))}"


def _holds_ends(store: TokenStore, name: str) -> bool:
    """Whether a split's documents are the ends of the training split's."""
    source, _, split = name.partition("/")
    changed = store[f"{source}/train"].manifest["rows"].get("changed", {}) if split == "validation" else {}
    return TAIL_HELD_OUT in changed


def trace_row(store: TokenStore, recipe: Recipe, step: int, row: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Lines that say which documents a row of a training step was made of, from its first token to its last target.

    Steps count from 0, as for `sequences`: metrics.jsonl lists what step s did as step s + 1, after it. Rows count
    from 0. Raises InputError where there is no such row.
    """
    _check_recipe_matches(store, recipe)
    batch, length = recipe.train.batch_sequences, recipe.train.sequence_length
    if not 0 <= step < recipe.train.steps:
        raise InputError(f"--step {step}: the recipe's steps are 0 to {recipe.train.steps - 1}; choose one of them")
    if not 0 <= row < batch:
        raise InputError(f"--row {row}: the rows of a step are 0 to {batch - 1}; choose one of them")
    source, epoch, index = (int(number) for number in sequences(recipe, store, step)[row])
    name = f"{list(recipe.data.sources)[source]}/train"
    split, start, stop = store[name], index * length, (index + 1) * length + 1
    yield f"step {step} (step {step + 1} in metrics.jsonl), row {row}: sequence {index:,} of {name}, epoch {epoch}"
    yield f"  which is its tokens {start:,} to {stop - 1:,}"
    for document in split.documents_between(start, stop):
        first, last = max(start, document.start), min(stop, document.start + document.tokens)
        yield (
            f"  tokens {first - start} to {last - start - 1}: document {document.number:,}, "
            f"from its token {first - document.start} of {document.tokens:,}"
        )
        yield f"    {document.file} row {document.row}, file's sha256 {document.sha256}"
        if tokenizer:
            yield f"    {_excerpt(tokenizer, split.read(first, last))}"


def _check_recipe_matches(store: TokenStore, recipe: Recipe) -> None:
    """A recipe of other data would be answered with rows that it never reads."""
    for key, made_with, wanted in settings_diff(store.manifest, recipe):
        raise InputError(
            f"{store.folder}: made with {key} {made_with}, the recipe says {wanted}; name the store's own recipe"
        )


def _excerpt(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    """How tokens read, in quotes and cut short."""
    text = tokenizer.decode(tokens[:_EXCERPT_CHARACTERS].tolist())
    is_whole = len(tokens) <= _EXCERPT_CHARACTERS >= len(text)
    return repr(text[:_EXCERPT_CHARACTERS]) + ("" if is_whole else "…")


def tokenizer_of(store: TokenStore, path: str | None) -> Tokenizer | None:
    """The tokenizer that a store was made with: the one at `path`, or where it was then; None where it is gone.

    Raises InputError where `path` holds another.
    """
    made_with = store.manifest["tokenizer"]
    place = path or made_with["path"]
    if path is None and not Path(place).exists():
        return None
    tokenizer = Tokenizer.load(place)
    if tokenizer.digest != made_with["digest"]:
        if path is None:
            return None
        raise InputError(f"{path}: not the tokenizer that {store.folder} was made with; name that one")
    return tokenizer
