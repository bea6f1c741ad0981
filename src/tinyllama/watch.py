"""The live page of a run: trackio's, served on this machine only."""

from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.recipe import Recipe
from tinyllama.train.metrics import PROJECT, open_trackio, trackio_folder


def watch(run: Path, port: int | None = None, open_browser: bool = True) -> None:
    """Serve the page of the runs beside `run` until interrupted. Raises InputError where nothing was tracked."""
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: no run here; give a folder that `tinyllama train` wrote")
    if not Recipe.load(run / "recipe.yaml").track.trackio or not trackio_folder(run).is_dir():
        raise InputError(f"{run}: nothing was tracked; train with --track.trackio true")
    trackio = open_trackio(run)
    trackio.show(PROJECT, open_browser=open_browser, block_thread=True, host="127.0.0.1", server_port=port)
