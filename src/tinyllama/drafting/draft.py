"""`tinyllama init`: a commented recipe for folders and files, with sizes for a stated training time on this machine."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tinyllama.drafting.machine import Machine, largest_micro_batch
from tinyllama.drafting.sizes import (
    MAX_EPOCHS,
    MIN_HELD_OUT_DOCUMENTS,
    SHAPES,
    Shape,
    Sizes,
    choose_sizes,
    sizes_of,
    validation_fraction_for,
    vocabulary_candidates,
    vocabulary_for,
)
from tinyllama.drafting.sources import DraftSource, draft_sources, free_name
from tinyllama.drafting.survey import SkippedFile, survey
from tinyllama.errors import InputError
from tinyllama.formatting import echo, format_bytes, format_count, format_duration, visible
from tinyllama.model.flops import flops_per_token, num_parameters
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.prepare.sources import split_suffixes
from tinyllama.progress import is_quiet
from tinyllama.recipe import Recipe, bundled_recipes
from tinyllama.recipe.loading import parse_yaml
from tinyllama.text import to_str
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer.training import train_tokenizer, training_text

_TRAINING_SHARE = 0.9  # of the stated time; the rest is for compilation, validation and checkpoints
_FIRST_MFU = 0.4  # before the first measurement
_FIRST_VOCAB_SIZE, _FIRST_BYTES_PER_TOKEN = 4096, 3.5  # before the first tokenizer
_MAX_MEASUREMENTS = 2
_TRIAL_BYTES = 2_000_000
_TRIAL_SHARE = 0.8  # of the text: the tokenizer of the recipe sees no validation text
_TRIAL_FILES = 64  # per source
_MIN_TEXT_BYTES = 2_000
_MICRO_BATCH_TOKENS = 8192
_MAX_VALIDATION_SEQUENCES = 512
_CHECKPOINT_SECONDS = 600
_EMBEDDING_RATE = 6  # relative to the matrices, as in the demo


@dataclass(frozen=True)
class Draft:
    """A drafted recipe, with its sources, the unused files and the reasons."""

    recipe: Recipe
    text: str
    """The recipe as YAML with comments."""
    sources: list[DraftSource]
    skipped: list[SkippedFile]
    reasons: dict[str, str]
    """Reason of each choice, by the last part of the field's name."""


def draft_recipe(paths: Sequence[str], minutes: float, describe_machine: Callable[[], Machine], file: Path) -> Draft:
    """Look at folders and files, and return a recipe whose training takes about `minutes` on a machine.

    `file` is the path of the recipe. The run has the file's name, with a number if a bundled recipe or a run has this
    name. Raises InputError if the files contain too little text, if no model fits into memory, and the same errors as
    `survey` and `draft_sources`.
    """
    if not 0 < minutes < 1e7:
        raise InputError(f"--minutes {minutes:g}: out of range; give a number of minutes such as 10")
    sources, skipped = draft_sources(survey(paths, file))
    text_bytes = sum(source.text_bytes for source in sources)
    if text_bytes < _MIN_TEXT_BYTES:
        found, least = format_bytes(text_bytes), format_bytes(_MIN_TEXT_BYTES)
        raise InputError(f"{' '.join(paths)}: {found} of text are too little to train on; give at least {least}")
    machine, seconds = describe_machine(), minutes * 60 * _TRAINING_SHARE
    flops = machine.hardware.peak_flops(machine.precision) * _FIRST_MFU * seconds
    first = choose_sizes(flops, _FIRST_VOCAB_SIZE, text_bytes / _FIRST_BYTES_PER_TOKEN)
    seen = min(text_bytes, first.tokens * _FIRST_BYTES_PER_TOKEN)
    vocab_size, bytes_per_token = try_vocabularies(sources, vocabulary_for(seen))
    fraction = validation_fraction_for(text_bytes)
    unique_tokens = text_bytes * (1 - fraction) / bytes_per_token
    shortest = min(source.text_bytes for source in sources) * fraction / bytes_per_token / 2
    bundled = bundled_recipes()
    name = free_name(_valid_name(file.stem), lambda one: one in bundled or Path("runs", one).exists())
    about = {
        "paths": _comment(shlex.join(paths)),
        "file": _comment(shlex.quote(str(file))),
        "name": name,
        "quoted_name": _scalar(name),
        "vocab_size": vocab_size,
        "sources": [_source_fields(source, text_bytes, fraction) for source in sources],
        "validation_fraction": fraction,
        "precision": machine.precision,
        "formats": machine.formats,
        "missing_formats": machine.missing_formats,
        "tasks": machine.tasks,
    }
    reasons = {
        "vocab_size": f"for {format_bytes(seen)} of text that training reads, {bytes_per_token:.2g} bytes per token",
        "validation_fraction": f"about {format_bytes(text_bytes * fraction)} of text",
    }

    def recipe_for(sizes: Sizes, speed: float) -> tuple[str, Recipe]:
        reasons.update(_size_reasons(sizes, speed, minutes, vocab_size))
        return _render(about | {"reasons": reasons}, sizes, speed, machine)

    def fits(shape: Shape) -> bool:
        recipe = recipe_for(sizes_of(shape, flops, vocab_size, unique_tokens, shortest), 1.0)[1]
        return largest_micro_batch(recipe, vocab_size, machine.hardware) > 0

    shapes = list(takewhile(fits, SHAPES))
    if not shapes:
        memory = format_bytes(machine.hardware.memory_bytes)
        raise InputError(f"init: no model fits into {memory} of memory; use a machine with more memory")
    sizes, speed = choose_sizes(flops, vocab_size, unique_tokens, shortest, shapes), 1.0
    for _ in range(_MAX_MEASUREMENTS):
        measured, model = sizes.shape, sizes.shape.model
        if not is_quiet():
            echo("measuring the speed of this machine …", to_stderr=True)
        speed = machine.measure(recipe_for(sizes, speed)[1], vocab_size)
        flops = speed * seconds * flops_per_token(model, vocab_size, model.context_length)
        sizes = choose_sizes(flops, vocab_size, unique_tokens, shortest, shapes)
        if sizes.shape.model.dim == model.dim:
            break
    text, recipe = recipe_for(sizes_of(measured, flops, vocab_size, unique_tokens, shortest), speed)
    return Draft(recipe, text, sources, skipped, reasons)


def default_file(path: str) -> Path:
    """Return the file for the recipe of a folder or file: its name with the ending .yaml, in the working directory."""
    name = Path(path).name if Path(path).name not in ("", "..") else Path(path).resolve().name
    return Path(f"{_valid_name(split_suffixes(name)[0] if Path(path).is_file() else name)}.yaml")


def _valid_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "mine"


def _scalar(text: str) -> str:
    """Return a name as YAML, in quotes if YAML would read a number or another type."""
    return yaml.safe_dump(text).removesuffix("...\n").strip()


def _comment(text: str) -> str:
    """Return a text for a comment, which a line end would end."""
    return visible(" ".join(text.split()))


def _source_fields(source: DraftSource, text_bytes: float, fraction: float) -> dict[str, Any]:
    count = len(source.files)
    files = f"{count:,} file{'s' * (count != 1)}"
    return {
        "name": _scalar(source.name),
        "summary": f"{files}, {format_bytes(source.text_bytes)} of text",
        "format": source.format,
        "path": json.dumps(source.path, ensure_ascii=False),
        "weight": float(f"{max(1e-6, source.text_bytes / text_bytes):.3g}"),
        "field": source.field and json.dumps(source.field, ensure_ascii=False),
        "other_fields": _comment(", ".join(source.other_fields)),
        "separator": source.separator and json.dumps(source.separator),
        "has_tail": source.num_documents * fraction < MIN_HELD_OUT_DOCUMENTS and not source.separator,
    }


def _render(fields: dict[str, Any], sizes: Sizes, speed: float, machine: Machine) -> tuple[str, Recipe]:
    """Return the recipe's text, and the recipe with the largest micro-batch that fits into memory, or one sequence.

    `speed` is in tokens per second.
    """
    length = sizes.shape.model.context_length
    checkpoint_steps = round(_CHECKPOINT_SECONDS * speed / (sizes.batch_sequences * length))
    validate_every = -(-sizes.steps // 8)
    model = sizes.shape.model.model_dump(include={"dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length"})
    fields = fields | {
        "model": model | {"tie_embeddings": json.dumps(sizes.shape.model.tie_embeddings)},
        "tokens": format_count(sizes.tokens),
        "batch_sequences": sizes.batch_sequences,
        "micro_batch_sequences": min(sizes.batch_sequences, max(1, _MICRO_BATCH_TOKENS // length)),
        "learning_rate": f"{sizes.shape.learning_rate:g}",
        "embedding_learning_rate": f"{_EMBEDDING_RATE * sizes.shape.learning_rate:g}",
        "warmup_steps": min(200, max(1, sizes.steps // 20)),
        "validate_every_steps": validate_every,
        # Validation takes about 5 % of the time: a forward pass costs a third of a training step.
        "validation_sequences": min(_MAX_VALIDATION_SEQUENCES, max(16, sizes.batch_sequences * validate_every // 7)),
        "checkpoint_every_steps": max(1, min(-(-sizes.steps // 4), checkpoint_steps)),
    }
    template = (resources.files("tinyllama") / "drafting" / "recipe.yaml.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    for _ in range(2):
        text = environment.from_string(template).render(fields)
        recipe = Recipe.model_validate(parse_yaml(text, str(fields["file"])))
        fits = largest_micro_batch(recipe, fields["vocab_size"], machine.hardware)
        if fits == recipe.train.effective_micro_batch_size(1):
            return text, recipe
        fields["micro_batch_sequences"] = max(1, fits)
    return text, recipe


def _size_reasons(sizes: Sizes, speed: float, minutes: float, vocab_size: int) -> dict[str, str]:
    parameters = num_parameters(sizes.shape.model, vocab_size)
    took = format_duration(sizes.tokens / speed)
    batch_tokens = sizes.batch_sequences * sizes.shape.model.context_length
    limit = f"{minutes:g} min" if not sizes.is_limited_by_text else f"{MAX_EPOCHS} epochs; more text would help"
    return {
        "model": f"{format_count(parameters)} parameters, {sizes.tokens / parameters:.2g} tokens per parameter",
        "tokens": f"{sizes.epochs:.2g} epochs, {took} at {speed:,.0f} tokens/s on this machine; limit: {limit}",
        "batch_sequences": f"{sizes.steps:,} steps of {batch_tokens:,} tokens",
    }


def try_vocabularies(sources: Sequence[DraftSource], preferred: int) -> tuple[int, float]:
    """Train tokenizers on a sample; return the best possible vocabulary size, and its mean bytes per token.

    A text with few different words cannot fill a large vocabulary, and a small one cannot hold many different
    characters. Raises InputError if no size is possible.
    """
    texts = list(_trial_texts(sources))
    text = training_text(texts)
    problem: InputError | None = None
    for size in vocabulary_candidates(preferred):
        try:
            return size, _bytes_per_token(train_tokenizer(text, size), texts)
        except InputError as error:
            problem = problem or error
    raise InputError(f"{sources[0].path}: {problem}")


def _bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / max(1, sum(len(tokenizer.encode(text)) for text in texts))


def _trial_texts(sources: Sequence[DraftSource]) -> Iterator[str]:
    """Yield documents from the beginnings of evenly spaced files of each source.

    `tokenizer train` reads more: its sample comes from the complete files.
    """
    total = sum(source.text_bytes for source in sources)
    for source in sources:
        budget = min(_TRIAL_BYTES * source.text_bytes / total, _TRIAL_SHARE * source.text_bytes)
        files = source.files[:: -(-len(source.files) // _TRIAL_FILES)]
        for file in files:
            remaining = int(budget / len(files))
            for row in read_rows(file.path, source.as_source()):
                if isinstance(row, SourceRow):
                    text = to_str(row.text)[:remaining]
                    yield text
                    remaining -= len(text)
                if remaining <= 0:
                    break
