"""Downloads from the Hugging Face hub, and one-line error messages for all requests to the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx import HTTPError, TransportError
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tinyllama.errors import InputError, summarize_error


def download_snapshot(repository: str, patterns: list[str]) -> Path:
    """Download a repository's files that match `patterns`, unless they are cached, and return their local folder.

    Raises InputError if the repository is neither in the cache nor readable on the hub.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # an error of a local file, not of the hub
            raise
        raise InputError(
            f"{repository}: no such folder here, and the hub cannot provide it ({summarize_error(error)}); correct the "
            "name, connect to the hub, or set HF_TOKEN to a token with read access"
        ) from None


def open_hub() -> HfApi:
    """Return a client of the hub at HF_ENDPOINT, by default huggingface.co."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)


@contextmanager
def translate_hub_errors(endpoint: str, name: str) -> Iterator[None]:
    """Convert errors of requests for the repository `name` to the hub at `endpoint` into InputError."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename:  # an error of a local file, not of the hub
            raise
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise InputError(_hub_error_message(cause, endpoint, name)) from None


def _hub_error_message(error: BaseException, endpoint: str, name: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    message = " ".join(str(error).split())
    if isinstance(error, HFValidationError):
        return f"{name!r}: not a repository name ({message.split(':')[0]}); give NAME or OWNER/NAME"
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        problem = f"{endpoint} refuses this token" if get_token() else "not logged in to the hub"
        return f"{name}: {problem}; set HF_TOKEN to a token with write access"
    if status in (403, 404):
        problem = f"{endpoint} does not allow this token to write there ({status})"
        return f"{name}: {problem}; give your user's or organization's OWNER/NAME, and a token with write access"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{name}: HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, TransportError):
        problem = f"cannot be reached ({message or type(error).__name__})"
        return f"{endpoint}: {problem}; check the connection and HF_ENDPOINT, then run this again"
    problem = f"{endpoint} refused the request ({message or type(error).__name__})"
    return f"{name}: {problem}; correct what the hub reports, or run this again later"
