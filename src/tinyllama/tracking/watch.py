"""`tinyllama watch`: trackio's page of a run and those beside it, on this machine only, or on a Space of the hub.

Feeds trackio from the runs' files wherever training does not do so itself: it also shows a run that was copied from
elsewhere, trained without trackio, scored later, or whose tracker died. Reads and writes `.trackio` beside the run.
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

from huggingface_hub import HfApi
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinyllama.errors import InputError, first_line, summarize_error
from tinyllama.formatting import echo
from tinyllama.hub import translate_hub_errors
from tinyllama.recipe import Recipe
from tinyllama.tracking.follow import RunTailer
from tinyllama.tracking.process import POLL_SECONDS, open_sink, try_acquire_sink
from tinyllama.tracking.tail import possible_baselines
from tinyllama.tracking.trackio_sink import PROJECT, SMOOTHING, create_baseline_runs, open_trackio, trackio_dir

TRACKIO = "trackio"
"""The sink's name in a run."""
_HOST = "127.0.0.1"
_LAST_PORT = 65_535
_ORDER = (
    "loss",
    "validation_loss",
    "validation_bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "mfu",
    "memory_gigabytes",
    "scores/hellaswag*",
)
"""What people look at first stands first."""


def watch(run: Path, port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page of the runs beside `run` until interrupted.

    Raises InputError where there is no run to show, and where the port is none or is taken.
    """
    if port is not None and not 1 <= port <= _LAST_PORT:
        raise InputError(f"--port {port}: no port; give 1 to {_LAST_PORT}, or none for a free one")
    with _feeding(run) as trackio:
        create_baseline_runs(run, possible_baselines(run, Recipe.load(run / "recipe.yaml")))
        address = _address(trackio, run, port)
        echo(f"watching {run}: {address} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def publish_page(run: Path, space: str, public: bool = False) -> str:
    """Put the page of the runs beside `run` on the hub's Space OWNER/NAME and return its URL; again, to bring it up.

    A Space that is not there yet is made, private unless `public`. Raises InputError where there is no run to show, and
    where the hub cannot be reached or will not have it.
    """
    os.environ["TRACKIO_PLOT_ORDER"] = ",".join(_ORDER)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
    if space.count("/") != 1:
        raise InputError(f"--publish {space}: no name of a Space; give OWNER/NAME")
    with _feeding(run) as trackio, translate_hub_errors(api.endpoint, space), contextlib.redirect_stdout(io.StringIO()):
        # Made here, since trackio would ask at the terminal for a token where the hub refuses this one.
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=not public, exist_ok=True)
        if "app.py" not in api.list_repo_files(space, repo_type="space"):
            importlib.import_module("trackio.deploy").deploy_as_space(space, private=not public)
        trackio.sync(PROJECT, space, private=not public, force=True)
    return f"{api.endpoint}/spaces/{space}"


def _address(trackio: Any, run: Path, port: int | None) -> str:
    """Start serving the page; where it is, showing loss against tokens, smoothed, of this run and what is beside it."""
    os.environ["TRACKIO_PLOT_ORDER"] = ",".join(_ORDER)  # its setting has no other place
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its greeting has the token with which runs are deleted
            page, url, _, _ = trackio.show(open_browser=False, block_thread=False, host=_HOST, server_port=port)
    except OSError as error:
        if port is None:
            raise InputError(f"--port: no port is free ({first_line(error)}); name one that is") from None
        raise InputError(f"--port {port}: {first_line(error)}; give another, or none for a free one") from None
    # Any other host is another site's name for this machine (DNS rebinding). The application has started: its
    # `add_middleware` refuses.
    page.app.middleware_stack = TrustedHostMiddleware(page.app.middleware_stack, [_HOST])
    ids = [record["id"] for record in trackio.SQLiteStorage.get_run_records(PROJECT)]
    name = run.resolve().name
    mine = [run_id for run_id in ids if run_id == name or run_id.startswith(f"{name}/")]
    shown = {"project": PROJECT, "run_ids": ",".join(mine), "x_axis": "tokens"}
    shown |= {"smoothing": str(SMOOTHING), "hide_empty_tabs": "true"}
    return f"{url.rstrip('/')}/?{urlencode(shown)}"


@contextlib.contextmanager
def _feeding(run: Path) -> Iterator[Any]:
    """trackio, with all of the folder's runs fed to it once, and on from there while the block runs."""
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: no run here; give a folder that `tinyllama train` wrote")
    trackio, ended = open_trackio(trackio_dir(run)), threading.Event()
    with Feeder(run.resolve().parent) as feeder:
        feeder.feed()
        if run.resolve() in feeder.failed:
            raise InputError(f"{run}: cannot be shown: {_problem(feeder.failed[run.resolve()], trackio_dir(run))}")
        thread = threading.Thread(target=_go_on, args=(feeder, ended), name="watch", daemon=True)
        thread.start()
        try:
            yield trackio
        finally:
            ended.set()
            thread.join()


def _problem(error: Exception, folder: Path) -> str:
    """Why a run cannot be shown, and what to do about it; `folder` is trackio's."""
    match error:
        case InputError():
            return str(error)
        case sqlite3.Error():
            remedy = f"move {folder} away, which is made again from the runs' files"
        case OSError():
            remedy = "make that possible and run this again"
        case _:
            remedy = "this is a fault of tinyllama or trackio; report it with these words"
    return f"{summarize_error(error)}; {remedy}"


def _go_on(feeder: "Feeder", ended: threading.Event) -> None:
    while not ended.wait(POLL_SECONDS):
        feeder.feed()


class Feeder:
    """Feeds trackio with the runs of a folder that nobody else follows, each until it fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followers: dict[Path, RunTailer] = {}
        self.failed: dict[Path, Exception] = {}
        self.locks = contextlib.ExitStack()

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *error: object) -> None:
        self.locks.close()

    def feed(self) -> None:
        """Show what is new; say, once, which run cannot be shown."""
        for run in sorted({path.parent for path in self.folder.glob("*/recipe.yaml")} - self.failed.keys()):
            try:
                if run in self.followers or self._try_follow(run):
                    self.followers[run].poll()
            except Exception as error:  # the page goes on with the other runs
                self.failed[run] = error
                echo(f"{run}: not shown from here on: {_problem(error, trackio_dir(run))}", to_stderr=True)

    def _try_follow(self, run: Path) -> bool:
        """Follow a run, unless another process does."""
        if not try_acquire_sink(run, TRACKIO, self.locks):
            return False
        recipe = Recipe.load(run / "recipe.yaml")
        self.followers[run] = RunTailer(run, recipe, TRACKIO, open_sink(TRACKIO, run, recipe), lambda: None)
        return True
