"""`tinyllama init`: writes a recipe, and prints the sources, the unused files and the choices with their reasons."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tinyllama.drafting.draft import Draft, default_file, draft_recipe
from tinyllama.drafting.machine import Machine, this_machine
from tinyllama.drafting.sources import DraftSource
from tinyllama.drafting.survey import skipped_lines
from tinyllama.errors import InputError
from tinyllama.files import atomic_write
from tinyllama.formatting import echo, format_bytes, format_count, format_table


def init(
    paths: Sequence[str],
    minutes: float,
    output: Path | None,
    force: bool,
    machine: Callable[[], Machine] = this_machine,
) -> Path:
    """Write a recipe for folders and files, print the choices with their reasons, and return the path of the recipe.

    `machine` returns the properties of the machine; it is called after the files are read. Raises InputError if the
    recipe's file exists, unless `force` is true, and the same errors as `draft_recipe`.
    """
    if not paths:
        raise InputError("init: no folder or file is named; give those with your text, such as `tinyllama init docs`")
    path = output or default_file(paths[0])
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file with --output")
    if path.exists() and not force:
        raise InputError(f"{path}: exists; name another file with --output, or replace this one with --force")
    draft = draft_recipe(paths, minutes, machine, path)
    with atomic_write(path) as file:
        file.write(draft.text.encode())
    for line in draft_lines(draft, path):
        echo(line)
    return path


def _fields(source: DraftSource) -> str:
    """Return the field with the text, and the other fields with text, which are not used."""
    others = f" (not {', '.join(source.other_fields)})" if source.other_fields else ""
    return f"{source.field or ''}{others}"


def draft_lines(draft: Draft, path: Path) -> Iterator[str]:
    """Yield the lines that describe a draft, whose recipe was written to `path`."""
    head = ("source", "format", "field", "files", "text", "begins with")
    rows = [
        (
            source.name, source.format, _fields(source), f"{len(source.files):,}", format_bytes(source.text_bytes),
            source.files[0].example,
        )
        for source in draft.sources
    ]  # fmt: skip
    yield from format_table(head, rows, right=("files", "text"))
    if draft.skipped:
        yield ""
        yield f"not used: {len(draft.skipped):,} files"
        yield from (f"    {line}" for line in skipped_lines(draft.skipped))
    train, reasons = draft.recipe.train, draft.reasons
    yield ""
    choices = (
        ("vocabulary", f"{draft.recipe.vocab_size:,} tokens", reasons["vocab_size"]),
        ("model", f"dim {draft.recipe.model.dim}, {draft.recipe.model.layers} layers", reasons["model"]),
        ("training", f"{format_count(train.tokens)} tokens", reasons["tokens"]),
        ("batch", f"{train.batch_sequences} sequences", reasons["batch_sequences"]),
        ("validation", f"{draft.recipe.data.validation_fraction:.1%}", reasons["validation_fraction"]),
        ("release", ", ".join(draft.recipe.release.formats), "formats whose libraries are installed"),
    )
    yield from format_table(("choice", "value", "reason"), choices)
    yield "`run` takes some minutes more than the training, for the release, its verification and the score."
    yield ""
    yield f"recipe: {path}"
