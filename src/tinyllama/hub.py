"""What the hub, or the way to it, says against a request, in one line with the remedy.

For everything that is sent there: releases and live pages. Nothing is read or written here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx import HTTPError, TransportError
from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tinyllama.errors import InputError, summarize_error

_TRY_AGAIN = (408, 409, 429)
"""Statuses below 500 that pass by themselves: time-out, conflict with another commit, too many requests."""


def download_snapshot(repository: str, patterns: list[str]) -> Path:
    """Return the local folder of a repository's files that match `patterns`, downloaded or from the hub's cache.

    Raises InputError if the repository is neither in the cache nor readable on the hub.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # a local file or disk, not the hub
            raise
        raise InputError(
            f"{repository}: no such folder here, and the hub cannot provide it ({summarize_error(error)}); correct the "
            "name, connect to the hub, or set HF_TOKEN to a token with read access"
        ) from None


@contextmanager
def translate_hub_errors(endpoint: str, name: str) -> Iterator[None]:
    """Raise InputError for what is said at `endpoint`, or on the way to it, against a request for repository `name`."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename:  # a file or a disk here, not the hub
            raise
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise InputError(_hub_error_message(cause, endpoint, name)) from None


def _hub_error_message(error: BaseException, endpoint: str, name: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join(str(error).split())
    if isinstance(error, HFValidationError):
        return f"{name!r}: no name of a repository ({said.split(':')[0]}); give NAME or OWNER/NAME"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        known = f"{endpoint} refuses this token" if get_token() else "the hub wants to know who you are"
        return f"{name}: {known}; set HF_TOKEN to a token of yours that may write"
    if status in (403, 404):
        where = f"{endpoint} does not let this token write there ({status})"
        return f"{name}: {where}; give OWNER/NAME of a user or organisation of yours, and a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name}: HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, TransportError):
        why = said or type(error).__name__
        return f"{endpoint}: cannot be reached ({why}); check the connection and HF_ENDPOINT, then run this again"
    later = status is None or status >= 500 or status in _TRY_AGAIN
    remedy = "run this again later" if later else "correct what the hub names, then run this again"
    return f"{name}: {endpoint} did not take it ({said or type(error).__name__}); {remedy}"
