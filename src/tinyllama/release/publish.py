"""What `tinyllama release` does with what it is given: release it, unless it is a release, and push it if told to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.release import release
from tinyllama.release.foreign import ALL_FORMATS, release_foreign
from tinyllama.release.push import push


def publish(
    source: str,
    step: int | None,
    formats: Sequence[str] | None,
    average: int | None,
    average_decay: float | None,
    force: bool,
    push_to: str | None,
    public: bool,
) -> Iterator[str]:
    """Do it, and say what was done, a line each. Raises InputError as `release`, `release_foreign` and `push` do."""
    if public and not push_to:
        raise InputError("release: --public says how a repository is made; name it with --push OWNER/NAME")
    folder = Path(source)
    if not push_to or not (folder / "release.json").is_file():
        if _is_foreign(folder):
            if (step, average, average_decay) != (None, None, None):
                raise InputError(f"{source}: others' weights have no steps; leave out --step and --average")
            folder = release_foreign(source, formats or ALL_FORMATS, force)
        else:
            folder = release(
                folder, step=step, force=force, formats=formats, average=average, average_decay=average_decay
            )
        yield f"release: {folder}"
    if push_to:
        yield f"pushed: {push(folder, push_to, public)}"


def _is_foreign(source: Path) -> bool:
    """Whether it is a Hugging Face folder, or no folder here: then it is the hub's to know."""
    return (source / "config.json").is_file() or not source.exists()
