"""Trains with faults planted: what `python -m tinyllama` does, and on the way what the variable FAULTS says, in JSON.

A fault is known by a row of tokens that the model is about to learn from, so it strikes the rank that has the row,
whatever the number of ranks; or by a file that is about to be flushed to disk. What ends a process, or holds it up,
happens once a run: a file in the working folder marks it. Each rank writes down what its guard decided.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyllama import hardware
from tinyllama.model.llama import Llama
from tinyllama.runs import log
from tinyllama.train.guard import Action, SpikeDetector

Fault = dict[str, Any]
"""`do`, and where: `row` (token ids), `file` (a part of its path) or `step` (of metrics.jsonl)."""

GO, PATIENCE_SECONDS = Path("go"), 120.0


def plant_in_losses(faults: Sequence[Fault], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """`nan`, `infinite` (gradient), `spike`, `kill`, `stop` and `wait` (for the file GO, or the one that `until` names)
    where the model meets a row; `slow` at every row."""
    loss = Llama.loss

    def planted(self: Llama, ids: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
        nats = loss(self, ids, targets, z_loss)
        rows = ids.tolist()
        for fault in faults:
            if fault["do"] == "slow":
                time.sleep(fault["seconds"])
            elif fault.get("row") in rows:
                nats = strike(fault, nats)
        return nats

    patch(Llama, "loss", planted)


def strike(fault: Fault, nats: Tensor) -> Tensor:
    what = fault["do"]
    if what == "nan":
        return nats * float("nan")
    if what == "spike":
        return nats + 1e6
    if what == "infinite":
        nats.register_hook(lambda gradient: gradient * float("inf"))
    elif first_time(fault):
        hold_or_end(fault)
    return nats


def hold_or_end(fault: Fault) -> None:
    if fault["do"] == "wait":
        wait_for(Path(fault.get("until", GO)))
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault["do"]])


def marker(fault: Fault) -> Path:
    """The file that says that a fault has struck."""
    place = fault.get("step") or fault.get("file", "").replace("/", "-") or fault["row"][:8]
    return Path(f"struck-{fault['do']}-{place}")


def first_time(fault: Fault) -> bool:
    try:
        marker(fault).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def plant_in_files(faults: Sequence[Fault]) -> None:
    """`kill` where a file is half written, `wait` before it is flushed, `tear` where a row of metrics.jsonl is."""
    fsync, append = os.fsync, log.RunLog._append

    def planted_fsync(fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        path = str(Path(f"/proc/self/fd/{number}").readlink())
        for fault in faults:
            if fault.get("file", "\0") in path and first_time(fault):
                if fault["do"] == "kill":
                    os.ftruncate(number, os.fstat(number).st_size // 2)
                hold_or_end(fault)
        fsync(fd)

    def planted_append(self: log.RunLog, path: Path, row: Any) -> None:
        for fault in faults:
            if fault["do"] == "tear" and "learning_rate" in row and row["step"] == fault["step"] and first_time(fault):
                with path.open("ab") as file:
                    file.write(json.dumps(row).encode()[:25])
                os.kill(os.getpid(), signal.SIGKILL)
        append(self, path, row)

    os.fsync = planted_fsync
    log.RunLog._append = planted_append  # type: ignore[method-assign]


def write_down_verdicts() -> None:
    judge = SpikeDetector.check
    path = Path(f"judged-{os.environ.get('RANK', '0')}.jsonl")

    def judging(self: SpikeDetector, loss: float, norm: float) -> tuple[Action, str, int]:
        decision = judge(self, loss, norm)
        with path.open("a") as file:
            file.write(json.dumps([str(loss), str(norm), decision[0].value, *decision[1:]]) + "\n")
        return decision

    SpikeDetector.check = judging  # type: ignore[method-assign]


def main() -> int:
    from tinyllama.cli import main as tinyllama

    planted: list[Fault] = json.loads(os.environ.get("FAULTS", "[]"))
    hardware.peak_flops = lambda device, precision: None  # measured, it takes longer than a run of these tests
    write_down_verdicts()
    plant_in_losses(planted)
    plant_in_files(planted)
    return tinyllama()


if __name__ == "__main__":
    sys.exit(main())
