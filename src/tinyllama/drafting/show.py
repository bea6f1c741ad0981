"""The output of `tinyllama init`: what was found, what is not used, and the choices with their reasons."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tinyllama.drafting.draft import Draft, draft_recipe
from tinyllama.drafting.machine import Machine, this_machine
from tinyllama.drafting.survey import SkippedFile
from tinyllama.errors import InputError
from tinyllama.files import atomic_write
from tinyllama.formatting import echo, format_bytes, format_count, format_table
from tinyllama.prepare.sources import skip_reason
from tinyllama.recipe import Recipe

_MAX_ENDINGS = 6  # per line
_EXAMPLE_CHARACTERS = 40


def init(
    paths: Sequence[str],
    minutes: float,
    output: Path | None,
    force: bool,
    machine: Callable[[], Machine] = this_machine,
) -> Path:
    """Write a recipe for folders and files, print what led to it, and return the path of the recipe.

    `machine` describes the machine; it is called after the files were read.
    Raises InputError if the recipe's file exists, unless `force` is true, and the same errors as `draft_recipe`.
    """
    if not paths:
        raise InputError("init: no folder or file is named; give those with your text, such as `tinyllama init docs`")
    _check_output(output, force)
    draft = draft_recipe(paths, minutes, machine, str(output) if output else None)
    path = output or Path(f"{draft.recipe.name}.yaml")
    _check_output(path, force)
    with atomic_write(path) as file:
        file.write(draft.text.encode())
    for line in draft_lines(draft, path):
        echo(line)
    return path


def _check_output(path: Path | None, force: bool) -> None:
    if path and path.is_dir():
        raise InputError(f"{path}: is a folder; name a file with --output")
    if path and path.exists() and not force:
        raise InputError(f"{path}: exists; name another file with --output, or replace this one with --force")


def draft_lines(draft: Draft, path: Path) -> Iterator[str]:
    """Yield the lines that describe a draft, whose recipe was written to `path`, and name the next command."""
    head = ("source", "format", "field", "files", "text", "begins with")
    rows = [
        (
            source.name, source.format, source.field or "", f"{len(source.files):,}", format_bytes(source.text_bytes),
            source.files[0].example[:_EXAMPLE_CHARACTERS],
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
    yield ""
    yield f"recipe: {path}"
    yield f"next:   {Recipe.load(path).command('run')}"


def skipped_lines(skipped: Sequence[SkippedFile]) -> Iterator[str]:
    """Yield one line per reason, with the number of files per ending, the most frequent first."""
    by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    for file in skipped:
        by_reason[file.reason][skip_reason(file.path).removeprefix("ending ")] += 1
    for reason, endings in sorted(by_reason.items(), key=lambda item: -item[1].total()):
        listed = [f"{count:,} {ending}" for ending, count in endings.most_common(_MAX_ENDINGS)]
        more = endings.total() - sum(count for _, count in endings.most_common(_MAX_ENDINGS))
        yield f"{reason}: {', '.join([*listed, *([f'{more:,} others'] if more else [])])}"
