"""Stand-in for wandb, which the variable FAKE_WANDB makes fail, block or record what it receives."""

import atexit
import ctypes
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Settings = dict
MODE = os.environ["FAKE_WANDB"]

if MODE == "import error":
    raise ImportError("half installed")


def init(**options: Any) -> Any:
    """Behave as FAKE_WANDB says."""
    match MODE:
        case "raise":
            raise ConnectionError("no page today")
        case "exit":
            raise SystemExit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "block":
            time.sleep(1e6)
        case "block the interpreter":
            ctypes.PyDLL(None).sleep(1_000_000)
        case "block at exit":
            atexit.register(time.sleep, 1e6)
            raise ConnectionError("no page today")
    return _record(Path(os.environ["FAKE_WANDB_FOLDER"]), options)


def _record(folder: Path, options: dict[str, Any]) -> Any:
    """Return an online run that appends rows to files; it is killed after the row of step FAKE_WANDB_LAST_STEP."""
    with (folder / "ids").open("a") as file:
        file.write(f"{options['id']} {options['project']}\n")
    steps = (folder / "server").read_text().split() if (folder / "server").exists() else []
    run = SimpleNamespace(offline=False, starting_step=int(steps[-1]) + 1 if steps else 0, config={})

    def log(row: dict[str, Any], step: int, commit: bool) -> None:
        with (folder / "server").open("a") as file:
            file.write(f"{step} ")
        with (folder / "rows").open("a") as file:
            file.write(f"{row['step']} ")
        if str(row["step"]) == os.environ.get("FAKE_WANDB_LAST_STEP"):
            os.kill(os.getpid(), signal.SIGKILL)

    def ignore(*arguments: Any, **options: Any) -> None:
        pass

    run.log, run.define_metric, run.alert, run.finish = log, ignore, ignore, ignore
    return run
