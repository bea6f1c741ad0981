"""Commands that export, verify and run a model."""

import secrets
import shlex
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tinyllama.cli.next_command import completion_command, echo_next
from tinyllama.errors import InputError, translate_damage_errors
from tinyllama.formatting import echo, print_json, stdout_to_stderr, visible
from tinyllama.progress import is_quiet

# Each command imports its modules when it runs, so that `tinyllama --help` does not wait for torch.
# ruff: noqa: PLC0415


def release(
    source: Positional[Annotated[str, arg(metavar="SOURCE")]],
    step: int | None = None,
    formats: tuple[Literal["huggingface", "gguf", "ctranslate2"], ...] | None = None,
    average: int | None = None,
    average_decay: float | None = None,
    force: bool = False,
    push: Annotated[str | None, arg(metavar="OWNER/NAME")] = None,
    public: bool = False,
) -> None:
    """Export a model to Hugging Face, GGUF and CTranslate2.

    The release folder also has a model card and the model's lineage.

    Examples:
        tinyllama release runs/mine
        tinyllama release runs/mine --step 2000 --formats huggingface gguf

    Args:
        source: A run, a checkpoint, a release, or a Hugging Face Llama's folder or hub name.
        step: Step of the checkpoint; the newest by default.
        formats: Formats of the release, instead of the recipe's release.formats.
        average: Number of checkpoints to average, instead of the recipe's release.average_checkpoints.
        average_decay: Weight of each averaged checkpoint relative to the next newer one.
        force: Replace an existing release.
        push: Repository on the Hugging Face hub to upload the release to.
        public: Make the repository public if --push creates it; private by default.
    """
    from tinyllama.api import release_run
    from tinyllama.release.push import push_release

    if public and not push:
        raise InputError("release: --public makes a new repository public; name the repository with --push OWNER/NAME")
    result = release_run(
        source,
        step=step,
        formats=formats,
        average=average,
        average_decay=average_decay,
        force=force,
        reuse=push is not None,
    )
    echo(f"release: {result.path}")
    if push:
        echo(f"pushed: {push_release(result.path, push, public)}")
    else:
        echo_next(shlex.join(["tinyllama", "verify", str(result.path)]))


def verify(release: Positional[Annotated[Path, arg(metavar="RELEASE")]], json: bool = False) -> int:
    """Run each format in its engine and compare the outputs.

    The outputs are compared with those of the checkpoint. The exit status is 1 if a check fails.

    Examples:
        tinyllama verify runs/mine
        tinyllama verify runs/mine/releases/step-00002000 --json

    Args:
        release: Folder of the release, or of a run, whose newest release is verified.
        json: Print the checks as JSON.
    """
    from tinyllama.release.verify import format_checks, verify_release
    from tinyllama.runs.run_dir import ReleaseDir, RunDir

    if not ReleaseDir(release).exists and (releases := RunDir(release).releases.releases()):
        release = releases[-1][0].path
    with translate_damage_errors(release), stdout_to_stderr(json):
        checks = verify_release(release)
    passed = all(check.passed for check in checks)
    if json:
        print_json({"release": str(release), "passed": passed, "checks": [asdict(check) for check in checks]})
    else:
        echo("\n".join(format_checks(checks)))
        if passed:
            echo_next(completion_command(release))
    return 0 if passed else 1


def generate(
    model: Positional[Annotated[str, arg(metavar="MODEL")]],
    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]] = "-",
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    seed: int | None = None,
) -> None:
    """Complete a text.

    The text is sampled and printed as it is generated. The seed is printed on standard error, unless --quiet is given.
    With --temperature 0, each token is the most probable one, so the text is always the same.

    Examples:
        tinyllama generate runs/mine "Once upon a time"
        cat prompt.txt | tinyllama generate runs/mine --num-samples 3 --seed 7

    Args:
        model: A run, a checkpoint, a release, or a Hugging Face folder or hub name.
        prompt: Beginning of the text; `-` reads standard input, without its last newline.
        max_new_tokens: Maximum number of generated tokens.
        temperature: Divisor of the logits: a lower temperature prefers probable tokens more; 0 takes the most probable.
        top_k: Number of most probable tokens to sample from; all tokens by default.
        top_p: Sample from the most probable tokens whose probabilities add up to this number; 1 means all tokens.
        min_p: Exclude tokens that are less probable than this fraction of the most probable token's probability.
        repetition_penalty: Divisor of the positive logits, and factor of the negative ones, of tokens in the preceding
            text; 1 means no penalty.
        num_samples: Number of texts, separated by lines of three hyphens; the seed increases by 1 per text.
        seed: Random seed; a new one for each call by default.
    """
    from tinyllama.api import stream_text
    from tinyllama.loading import load_model, load_tokenizer
    from tinyllama.model.generation import Sampling

    if seed is None:
        seed = secrets.randbelow(2**32) if temperature else 0
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if num_samples < 1:
        raise InputError(f"num_samples: {num_samples} is out of range; give at least 1")
    text = _read_standard_input() if prompt == "-" else prompt
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    for number in range(num_samples):
        own = replace(sampling, seed=seed + number)
        parts = stream_text(loaded, text, max_new_tokens, own, tokenizer=tokenizer)
        first = next(parts)  # raises an error if the prompt or an option is invalid
        if number:
            echo("---")
        if temperature and not is_quiet():
            echo(f"seed {seed + number}", to_stderr=True)
        for part in chain([first], parts):
            print(visible(part) if sys.stdout.isatty() else part, end="", flush=True)  # noqa: T201
        echo()


def _read_standard_input() -> str:
    """Return the text of standard input, without its last newline. Raises InputError if there is none, or no UTF-8."""
    if sys.stdin.isatty():
        raise InputError("generate: no prompt; give it after the model, or write it to standard input")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"generate: standard input is not UTF-8 text (byte {error.start:,}); convert it") from None
