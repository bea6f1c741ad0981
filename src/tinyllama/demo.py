"""Demo: from the raw text of the embedded corpus to a released and evaluated model, within minutes on two CPU cores.

The demo calls the same functions as the commands and prints the results and their locations. If the demo is
interrupted, running the command again resumes it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyllama.api import evaluate_model, generate_text, prepare_store, train_model
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.evaluate.results import format_evaluation
from tinyllama.files import disk_usage_bytes
from tinyllama.formatting import echo, format_bytes
from tinyllama.model.flops import num_parameters
from tinyllama.prepare.corpus import FOLDERS, write_corpus
from tinyllama.prepare.inspection import prepared_lines
from tinyllama.prepare.selection import train_recipe_tokenizer
from tinyllama.recipe import Recipe
from tinyllama.release.formats import check_format_libraries
from tinyllama.release.release import release_run
from tinyllama.release.verify import Check, format_checks, verify_release
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.validation import gzip_bits_per_byte

VOCAB_SIZE = 4096
_SAMPLE_BYTES = 12_000_000
_PROMPTS = ("The function returns a", "def main(")


def run_demo(recipe: Recipe) -> int:
    """Run every stage of the recipe on the embedded corpus, print results and next steps, and return the exit status.

    The status is 1 if a check of `verify` fails.
    """
    _corpus_folder(recipe)  # raises if the recipe has other sources
    check_format_libraries(recipe.release.formats)
    started = time.monotonic()
    failed: list[Check] = []
    stages: tuple[tuple[str, Callable[[Recipe], Iterator[str]]], ...] = (
        ("real text, from this Python and its packages", _corpus),
        ("a Llama-style tokenizer", _tokenizer),
        ("the token store", _store),
        ("training", _training),
        ("the release", _release),
        ("every format in its own engine", lambda recipe: _verification(recipe, failed)),
        ("the score", _score),
        ("completions", _completions),
    )
    for number, (title, stage) in enumerate(stages, 1):
        echo(f"\n{number}/{len(stages)} {title}")
        for line in stage(recipe):
            echo(f"    {line}")
    minutes = (time.monotonic() - started) / 60
    if failed:
        names = ", ".join(f"{check.subject} ({check.what})" for check in failed)
        echo(f"\nFailed after {minutes:.1f} minutes: {names}; see stage 6/{len(stages)} above")
        return 1
    echo(f"\nDone in {minutes:.1f} minutes. What to do next:")
    echo("\n".join(f"    {line}" for line in _next_steps(recipe)))
    return 0


def _corpus(recipe: Recipe) -> Iterator[str]:
    folder = _corpus_folder(recipe)
    if TokenStore.exists(recipe.data.store):
        yield f"{folder}: already prepared"
        return
    for name, sizes in write_corpus(folder).items():
        parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in sizes.items())
        yield f"{folder / name}: {format_bytes(sum(sizes.values()))} ({parts})"


def _corpus_folder(recipe: Recipe) -> Path:
    """Return the folder in which the recipe's sources expect the embedded corpus."""
    paths = {name: Path(source.path) for name, source in recipe.data.sources.items()}
    folder = next(iter(paths.values())).parent
    if paths != {name: folder / name for name in FOLDERS}:
        raise InputError(
            f"demo: recipe {recipe.name!r} has its own sources ({', '.join(map(str, paths.values()))}), but the demo "
            "uses the embedded corpus; run prepare, train and release instead"
        )
    return folder


def _tokenizer(recipe: Recipe) -> Iterator[str]:
    if not (Path(recipe.tokenizer) / "tokenizer.json").is_file():
        train_recipe_tokenizer(recipe, VOCAB_SIZE, _SAMPLE_BYTES)
    yield f"{recipe.tokenizer}: {Tokenizer.load(recipe.tokenizer).vocab_size:,} tokens"


def _store(recipe: Recipe) -> Iterator[str]:
    prepare_store(recipe)
    yield from prepared_lines(TokenStore.open(recipe.data.store))


def _training(recipe: Recipe) -> Iterator[str]:
    vocab_size = Tokenizer.load(recipe.tokenizer).vocab_size
    parameters, batch = num_parameters(recipe.model, vocab_size), recipe.train.batch_tokens
    yield f"{parameters:,} parameters, {recipe.train.steps} steps of {batch:,} tokens"
    yield f"watch it: tinyllama watch {RunDir.of_recipe(recipe).path}"
    run = train_model(recipe)
    rows = list(RunDir(run.path).metrics())
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    yield f"loss {rows[0]['loss']:.3f} at step 1, {rows[-1]['loss']:.3f} at the end; {speed:,.0f} tokens/s"
    bits_per_byte = rows[-1].get("validation_bits_per_byte")
    if bits_per_byte is None:
        yield "not validated: no documents for validation (data.validation_fraction is 0)"
        return
    packed = gzip_bits_per_byte(recipe, TokenStore.open(recipe.data.store), Tokenizer.load(recipe.tokenizer))
    verdict = "better" if bits_per_byte < packed else "WORSE: something is wrong, or the run was too short"
    yield f"validation: {bits_per_byte:.3f} bits per byte; gzip -9 on the same documents: {packed:.3f} ({verdict})"


def _newest_release(recipe: Recipe) -> Path:
    run = RunDir.of_recipe(recipe)
    return run.releases.release(run.find_checkpoint().name).path


def _release(recipe: Recipe) -> Iterator[str]:
    folder = _newest_release(recipe)
    if not folder.exists():
        try:
            release_run(RunDir.of_recipe(recipe).path)
        except RunStoppedError as error:
            if not folder.exists():
                raise
            yield str(error)  # an engine crashed on the finished release, and the later checks of the release will fail
    for path in sorted(path for path in folder.glob("*/*") if path.suffix in (".gguf", ".safetensors", "")):
        yield f"{path}: {format_bytes(disk_usage_bytes(path))}"


def _verification(recipe: Recipe, failed: list[Check]) -> Iterator[str]:
    checks = verify_release(_newest_release(recipe))
    failed += [check for check in checks if not check.passed]
    yield from format_checks(checks)


def _score(recipe: Recipe) -> Iterator[str]:
    if recipe.release.limit:
        yield f"a fixed subset, the first {recipe.release.limit} items of each task: not a score to quote"
    model = str(_newest_release(recipe))
    if result := evaluate_model(model, recipe.release.tasks, limit=recipe.release.limit):
        yield from format_evaluation(result.evaluation)
        yield f"saved: {result.path}"


def _completions(recipe: Recipe) -> Iterator[str]:
    for prompt in _PROMPTS:
        text = generate_text(_newest_release(recipe), prompt, 48, temperature=0.7, top_k=50)
        yield from f"> {text}".splitlines()


def _next_steps(recipe: Recipe) -> Iterator[str]:
    folder = _newest_release(recipe)
    yield f"read the card:      {folder}/huggingface/README.md"
    yield f'complete a prompt:  tinyllama generate {folder} "import os"'
    yield f"see the curves:     tinyllama watch {RunDir.of_recipe(recipe).path}"
    yield 'train on your text: README.md, "Your own data"'
