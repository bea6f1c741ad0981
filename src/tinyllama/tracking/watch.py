"""`tinyllama watch`: trackio's page of the runs in a folder, served on this machine or on a Hugging Face Space.

`tinyllama watch` also sends data to trackio that training did not send, for example because the run was copied from
another machine, trained without trackio, or scored later. trackio's database `.trackio` is in the folder that contains
the runs.
"""

import contextlib
import importlib
import io
import os
import sqlite3
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinyllama.errors import InputError, first_line, summarize_error
from tinyllama.evaluate.results import PUBLISHED_BASELINES
from tinyllama.formatting import echo
from tinyllama.hub import open_hub, translate_hub_errors
from tinyllama.runs.run_dir import RunDir, runs_in
from tinyllama.tracking.follow import RunFollower, published_name
from tinyllama.tracking.trackers import POLL_SECONDS, open_sink, try_acquire_sink
from tinyllama.tracking.trackio_sink import PROJECT, SMOOTHING, create_baseline_runs, open_trackio, trackio_dir

_SINK = "trackio"
_HOST = "127.0.0.1"
_MAX_PORT = 65_535
_PLOT_ORDER = ",".join((
    "loss", "validation_loss", "validation_bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second", "mfu",
    "memory_gigabytes", "scores/hellaswag*",
))  # fmt: skip
"""Metrics in the order in which the page shows them."""


def watch(path: Path, port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page that shows a run and the other runs in the same parent folder, until interrupted.

    Raises InputError if there is no run to show, or if the port is invalid or in use.
    """
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise InputError(f"--port {port}: not a port; give 1 to {_MAX_PORT}, or omit --port for a free one")
    run = RunDir.open(path)
    with _feeding(run) as trackio:
        create_baseline_runs(run, _possible_baselines(run))
        address = _serve(trackio, run, port)
        echo(f"watching {path}: {address} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def publish_page(path: Path, space: str, public: bool = False) -> str:
    """Upload the page of a run and the other runs in the same parent folder to a Hugging Face Space; return its URL.

    `space` is OWNER/NAME. A new Space is private unless `public` is true. Raises InputError if there is no run to show,
    or if the hub cannot be reached or refuses the upload.
    """
    os.environ["TRACKIO_PLOT_ORDER"] = _PLOT_ORDER
    api = open_hub()
    if space.count("/") != 1:
        raise InputError(f"--publish {space}: not the name of a Space; give OWNER/NAME")
    run = RunDir.open(path)
    with _feeding(run) as trackio, translate_hub_errors(api.endpoint, space), contextlib.redirect_stdout(io.StringIO()):
        # The Space is created here, because trackio would prompt for another token if the hub refused this one.
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=not public, exist_ok=True)
        if "app.py" not in api.list_repo_files(space, repo_type="space"):
            importlib.import_module("trackio.deploy").deploy_as_space(space, private=not public)
        trackio.sync(PROJECT, space, private=not public, force=True)
    return f"{api.endpoint}/spaces/{space}"


def _possible_baselines(run: RunDir) -> list[str]:
    """Return the names of the baselines that may get scores; an empty list if the run makes no releases."""
    recipe, rows = run.recipe(), run.releases.table()["baselines"]
    published = [row["name"] for row in rows if (row["source"] or "").startswith("published")]
    if not published and recipe.has_milestones:
        published = [baseline.name for baseline in PUBLISHED_BASELINES]
    return [*recipe.release.baselines, *dict.fromkeys(map(published_name, published))] if published else []


def _serve(trackio: Any, run: RunDir, port: int | None) -> str:
    """Start serving the page; return its URL, which selects the run and sets tokens as the x axis."""
    os.environ["TRACKIO_PLOT_ORDER"] = _PLOT_ORDER  # trackio has no argument for this setting
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints the token that allows deleting runs
            page, url, _, _ = trackio.show(open_browser=False, block_thread=False, host=_HOST, server_port=port)
    except OSError as error:
        if port is None:
            raise InputError(f"--port: found no free port ({first_line(error)}); give one") from None
        raise InputError(f"--port {port}: {first_line(error)}; give another, or omit --port for a free one") from None
    # Refuse other host names, since a website may resolve its own name to this machine (DNS rebinding).
    # `add_middleware` would raise, because the application has started.
    page.app.middleware_stack = TrustedHostMiddleware(page.app.middleware_stack, [_HOST])
    ids = [record["id"] for record in trackio.SQLiteStorage.get_run_records(PROJECT)]
    selected = [run_id for run_id in ids if run_id == run.name or run_id.startswith(f"{run.name}/")]
    query = {"project": PROJECT, "run_ids": ",".join(selected), "x_axis": "tokens"}
    query |= {"smoothing": str(SMOOTHING), "hide_empty_tabs": "true"}
    return f"{url.rstrip('/')}/?{urlencode(query)}"


@contextlib.contextmanager
def _feeding(run: RunDir) -> Iterator[Any]:
    """Send all runs of the folder to trackio, yield trackio, and keep sending new data while the block runs."""
    trackio, ended = open_trackio(trackio_dir(run)), threading.Event()
    with TrackioFeeder(run.path.resolve().parent) as feeder:
        feeder.feed()
        if error := feeder.failed.get(RunDir(run.path.resolve())):
            raise InputError(f"{run.path}: cannot be shown: {_problem(error, trackio_dir(run))}")

        def feed_until_ended() -> None:
            while not ended.wait(POLL_SECONDS):
                feeder.feed()

        thread = threading.Thread(target=feed_until_ended, name="watch", daemon=True)
        thread.start()
        try:
            yield trackio
        finally:
            ended.set()
            thread.join()


def _problem(error: Exception, trackio_folder: Path) -> str:
    """Return the reason why a run cannot be shown, and the remedy."""
    match error:
        case InputError():
            return str(error)
        case sqlite3.Error():
            remedy = f"move {trackio_folder} away; it will be created again from the runs' files"
        case OSError():
            remedy = "remove the cause and run the command again"
        case _:
            remedy = "this is a bug in tinyllama or trackio; please report it"
    return f"{summarize_error(error)}; {remedy}"


class TrackioFeeder:
    """Followers that send a folder's runs to trackio, except runs that another process follows.

    A follower that has failed is not used again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followers: dict[RunDir, RunFollower] = {}
        self.failed: dict[RunDir, Exception] = {}
        self.locks = contextlib.ExitStack()

    def __enter__(self) -> "TrackioFeeder":
        return self

    def __exit__(self, *error: object) -> None:
        self.locks.close()

    def feed(self) -> None:
        """Send new items to trackio; print one line for each run that cannot be shown."""
        for run in runs_in(self.folder):
            try:
                if run in self.failed or not (run in self.followers or self._try_follow(run)):
                    continue
                self.followers[run].poll()
            except Exception as error:  # the page still shows the other runs
                self.failed[run] = error
                echo(f"{run.path}: no longer shown: {_problem(error, trackio_dir(run))}", to_stderr=True)

    def _try_follow(self, run: RunDir) -> bool:
        if not try_acquire_sink(run, _SINK, self.locks):
            return False
        self.followers[run] = RunFollower(run, _SINK, open_sink(_SINK, run))
        return True
