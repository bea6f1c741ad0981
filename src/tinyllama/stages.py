"""All stages of a recipe in turn: from raw text to a verified and evaluated release.

The stages call the same functions as the commands, and print the results and their locations. The stage of the release
does not compare its files with transformers, because the verification does this. A stage whose result is complete is
not repeated, except the verification, which reads every file of the release again. After an interruption the same call
resumes the stages.
"""

import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tinyllama.api import evaluate_model, generate_text, prepare_store, train_model
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError, RunStoppedError
from tinyllama.evaluate.results import Evaluation, format_evaluation
from tinyllama.files import disk_usage_bytes
from tinyllama.formatting import echo, format_bytes
from tinyllama.loading import load_model
from tinyllama.preflight import check_stages, load_tokenizer, tokenizer_place
from tinyllama.prepare.corpus import FOLDERS, write_corpus
from tinyllama.prepare.inspection import prepared_lines
from tinyllama.prepare.selection import train_recipe_tokenizer
from tinyllama.recipe import Recipe
from tinyllama.release.metadata import covers_recipe
from tinyllama.release.release import release_run
from tinyllama.release.verify import Check, format_checks, verify_release
from tinyllama.runs.run_dir import ReleaseDir, RunDir
from tinyllama.train.samples import sample_prompts
from tinyllama.train.validation import gzip_bits_per_byte

Stage = tuple[str, Callable[[Recipe], Iterator[str]]]
"""Title of a stage, and the function that runs the stage and yields the lines of its output."""
_COMPLETION_TOKENS = 48


def run_demo(recipe: Recipe) -> int:
    """Write the embedded corpus, and run every stage of the recipe on it; see `run_stages`."""
    _corpus_folder(recipe)  # raises if the recipe has other sources
    return run_stages(recipe, [("real text, from this Python and its packages", _corpus)])


def run_stages(recipe: Recipe, first: Sequence[Stage] = ()) -> int:
    """Run the stages `first` and every stage of the recipe, print results and next steps, and return the exit status.

    The status is 1 if a check of `verify` fails. Raises InputError before the first stage if a library is missing, and
    the same errors as each stage.
    """
    tasks, skipped = check_stages(recipe)
    for reason in skipped if recipe.release.tasks else ():
        echo(f"release.tasks: {reason}; this score will be skipped", to_stderr=True)
    started = time.monotonic()
    failed: list[Check] = []
    stages: tuple[Stage, ...] = (
        *first,
        ("the tokenizer", _tokenizer),
        ("the token store", _store),
        ("training", _training),
        ("the release", _release),
        ("every format in its own engine", partial(_verification, failed=failed)),
        ("the score", partial(_score, tasks=tasks, skipped=skipped)),
        ("completions", _completions),
    )
    for number, (title, stage) in enumerate(stages, 1):
        echo(f"\n{number}/{len(stages)} {title}")
        for line in stage(recipe):
            echo(f"    {line}")
    minutes = (time.monotonic() - started) / 60
    if failed:
        names = ", ".join(f"{check.subject} ({check.what})" for check in failed)
        echo(f"\nFailed after {minutes:.1f} minutes: {names}; see stage {len(stages) - 2}/{len(stages)} above")
        return 1
    echo(f"\nDone in {minutes:.1f} minutes. What to do next:")
    echo("\n".join(f"    {line}" for line in _next_steps(recipe, is_demo=bool(first))))
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
            f"uses the embedded corpus; run `{recipe.command('run')}` instead"
        )
    return folder


def _tokenizer(recipe: Recipe) -> Iterator[str]:
    if tokenizer_place(recipe) is None:
        yield from train_recipe_tokenizer(recipe).lines()
    tokenizer = load_tokenizer(recipe)
    tokenizer.check_formats(recipe.release.formats)
    yield f"{recipe.tokenizer}: {tokenizer.vocab_size:,} tokens"


def _store(recipe: Recipe) -> Iterator[str]:
    prepare_store(recipe)
    yield from prepared_lines(TokenStore.open(recipe.data.store))


def _training(recipe: Recipe) -> Iterator[str]:
    train_model(recipe)
    rows = list(RunDir.of_recipe(recipe).metrics())
    speed = statistics.median(row["tokens_per_second"] for row in rows)
    losses = [row["loss"] for row in rows if row["loss"] is not None]  # a skipped step has no loss
    if losses:
        yield f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end; {speed:,.0f} tokens/s"
    bits_per_byte = rows[-1].get("validation_bits_per_byte")
    if bits_per_byte is None:
        yield "not validated: no validation sequence (see data.validation_fraction)"
        return
    packed = gzip_bits_per_byte(recipe, TokenStore.open(recipe.data.store), load_tokenizer(recipe))
    verdict = "better" if bits_per_byte < packed else "worse: the run was too short, or something is wrong"
    yield f"validation: {bits_per_byte:.3f} bits per byte; gzip -9 on the same documents: {packed:.3f} ({verdict})"


def _newest_release(recipe: Recipe) -> ReleaseDir:
    """Return the release of the newest checkpoint, which may not exist."""
    run = RunDir.of_recipe(recipe)
    return run.releases.release(run.find_checkpoint().name)


def _release(recipe: Recipe) -> Iterator[str]:
    run, release = RunDir.of_recipe(recipe), _newest_release(recipe)
    is_current = run.find_checkpoint().is_released_as(release)
    if not is_current or not {*recipe.release.formats} <= {*release.metadata()["formats"]}:
        try:
            release_run(run.path, force=release.exists)
        except RunStoppedError as error:
            if not run.find_checkpoint().is_released_as(release):
                raise
            yield str(error)  # an engine crashed on the finished release, and the later checks of the release will fail
    for path in sorted(path for path in release.path.glob("*/*") if path.suffix in (".gguf", ".safetensors", "")):
        yield f"{path}: {format_bytes(disk_usage_bytes(path))}"


def _verification(recipe: Recipe, failed: list[Check]) -> Iterator[str]:
    checks = verify_release(_newest_release(recipe).path)
    failed += [check for check in checks if not check.passed]
    yield from format_checks(checks)


def _score(recipe: Recipe, tasks: Sequence[str], skipped: Sequence[str]) -> Iterator[str]:
    """Score the release on the tasks that this machine can evaluate; `skipped` has the reasons for the other tasks."""
    yield from (f"not scored: {reason}" for reason in skipped)
    if not tasks:
        return
    release, limit = _newest_release(recipe), recipe.release.limit
    if limit:
        yield f"a fixed subset, the first {limit} items of each task: not a score to quote"
    saved = release.evaluation()
    if saved and covers_recipe(saved, {"tasks": tasks, "limit": limit}):
        yield from format_evaluation(Evaluation(**saved))
        yield f"already saved: {release.evaluation_path}"
    elif result := evaluate_model(str(release.path), tasks, limit=limit):
        yield from format_evaluation(result.evaluation)
        yield f"saved: {result.path}"


def _completions(recipe: Recipe) -> Iterator[str]:
    folder = _newest_release(recipe).path
    model, tokenizer, prompts = load_model(folder), load_tokenizer(recipe), _prompts(recipe)
    for prompt in prompts:
        text = generate_text(model, prompt, _COMPLETION_TOKENS, tokenizer=tokenizer, temperature=0.7, top_k=50)
        yield from f"> {text}".splitlines()
    if not prompts:
        yield "none: train.sample_prompts is empty, or no text is held out for validation"


def _prompts(recipe: Recipe) -> list[str]:
    return sample_prompts(recipe, TokenStore.open(recipe.data.store), load_tokenizer(recipe))


def _next_steps(recipe: Recipe, is_demo: bool) -> Iterator[str]:
    folder, run = _newest_release(recipe).path, RunDir.of_recipe(recipe).path
    prompt = next(iter(_prompts(recipe)), "").partition("\n")[0] or "The"
    yield f"read the card:      {folder}/huggingface/README.md"
    yield f"complete a prompt:  tinyllama generate {folder} {shlex.quote(prompt)}"
    yield f"see the curves:     tinyllama watch {run}"
    if is_demo:
        yield "train on your text: tinyllama init FOLDER, and then the command that it prints"
    else:
        more = f"--name {recipe.name}-longer --train.tokens {2 * recipe.train.tokens}"
        yield f"train for longer:   {recipe.command('run')} {more}"
