"""The end of a run: errors with a remedy, the event of the end, and the step from which training resumes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tinyllama.distributed import is_peer_failure
from tinyllama.errors import CommandStopped, InputError, RunStoppedError, first_line
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir


@contextmanager
def translate_system_errors(run: RunDir, log: RunLog | None) -> Iterator[None]:
    """Convert disk-full and lost-rank errors into RunStoppedError with a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        problem = _problem_and_remedy(error, run)
        if problem is None:
            raise
        if log and is_peer_failure(error):
            log.event("rank-lost", log.step, problem=first_line(error))
        stopped = RunStoppedError(problem)
        for note in getattr(error, "__notes__", ()):
            stopped.add_note(note)
        raise stopped from error


def _problem_and_remedy(error: OSError | RuntimeError, run: RunDir) -> str | None:
    """Return the message for a full disk or a lost rank; None for other errors."""
    if isinstance(error, OSError):
        is_full = error.errno == errno.ENOSPC
        return f"{error.filename or run.path}: {error.strerror}; free some space and rerun" if is_full else None
    is_from_torch = type(error).__module__.startswith("torch._")
    # not an OSError, because the error was raised in the compiler's process or is wrapped in another exception
    if is_from_torch and os.strerror(errno.ENOSPC) in str(error):
        folders = f"{os.environ.get('TMPDIR', '/tmp')} and {os.environ.get('TORCHINDUCTOR_CACHE_DIR')}"
        remedy = f"free some space in {folders}, or set TMPDIR and XDG_CACHE_HOME"
        return f"{run.path}: torch.compile has no disk space; {remedy}"
    if not is_peer_failure(error):
        return None
    remedy = "find the cause in that rank's output and rerun (torchrun --max-restarts=N reruns automatically)"
    return f"{run.path}: another rank cannot be reached; {remedy}"


@contextmanager
def log_run_end(log: RunLog | None, steps: int) -> Iterator[None]:
    """Log an event with the reason why the run of `steps` steps ended, and add the step to resume from to an error."""
    event: tuple[str, dict[str, str]] | None = ("done", {})
    try:
        yield
    except BaseException as error:
        event = _end_event(error)
        if log and (note := _resume_note(log, steps)):
            error.add_note(note)
        raise
    finally:
        if log and event:
            with suppress(OSError):  # a full disk may stop the run and also prevent writing this event
                log.event(event[0], log.step, **event[1])


def _end_event(error: BaseException) -> tuple[str, dict[str, str]] | None:
    """Return the name and details of the event for an error that ended the run; None if the event is already logged."""
    match error:
        case CommandStopped(signal=str(name)) | RunStoppedError(signal=str(name)) if name:
            return "signal", {"signal": name}
        case KeyboardInterrupt():
            return "interrupted", {}
        case RunStoppedError() | InputError():
            return "failed", {"problem": str(error)}
    return None if is_peer_failure(error) else ("failed", {"problem": repr(error)})


def _resume_note(log: RunLog, steps: int) -> str | None:
    """Return the step of the newest checkpoint and the number of lost later steps; None if all `steps` are saved."""
    try:
        newest = log.run.newest_checkpoint()
    except OSError:  # the error that ended the run must stay visible
        return None
    step = newest.step if newest else 0
    if step >= steps:
        return None
    lost = max(0, log.step - step)
    return f"training resumes from step {step:,} ({lost:,} step{'s' * (lost != 1)} lost)"
