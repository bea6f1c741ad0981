"""Program that runs `python -m tinyllama` with the faults of the variable FAULTS, a JSON list, injected.

A fault is triggered by a row of tokens in a batch, so it strikes the rank that has the row, whatever the number of
ranks; or by a file that is about to be flushed to disk. A fault that ends or holds up a process happens once per run:
a file in the working directory marks it. Each rank records the decisions of its spike detector.
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
from tinyllama.train.guard import Decision, SpikeDetector

Fault = dict[str, Any]
"""`do`, and the trigger: `row` (token ids), `file` (a part of its path) or `step` (of metrics.jsonl)."""

RESUME_FILE, WAIT_SECONDS = Path("go"), 120.0


def inject_into_losses(faults: Sequence[Fault], patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Inject `nan`, `infinite` (gradient), `spike`, `kill`, `stop` and `wait` at rows; `slow` at every row.

    `wait` holds the process until RESUME_FILE exists, or the file that `until` names.
    """
    loss = Llama.loss

    def faulty_loss(self: Llama, ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nats = loss(self, ids, *arguments, **options)
        rows = ids.tolist()
        for fault in faults:
            if fault["do"] == "slow":
                time.sleep(fault["seconds"])
            elif fault.get("row") in rows:
                nats = inject(fault, nats)
        return nats

    patch(Llama, "loss", faulty_loss)


def inject(fault: Fault, nats: Tensor) -> Tensor:
    what = fault["do"]
    if what == "nan":
        return nats * float("nan")
    if what == "spike":
        return nats + 1e6
    if what == "infinite":
        nats.register_hook(lambda gradient: gradient * float("inf"))
    elif is_first_time(fault):
        wait_or_kill(fault)
    return nats


def wait_or_kill(fault: Fault) -> None:
    if fault["do"] == "wait":
        wait_for_file(Path(fault.get("until", RESUME_FILE)))
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault["do"]])


def marker_path(fault: Fault) -> Path:
    """Return the file that marks that a fault has happened."""
    place = fault.get("step") or fault.get("file", "").replace("/", "-") or fault["row"][:8]
    return Path(f"struck-{fault['do']}-{place}")


def is_first_time(fault: Fault) -> bool:
    try:
        marker_path(fault).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def wait_for_file(file: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def inject_into_files(faults: Sequence[Fault]) -> None:
    """Inject `kill` after half of a file is written, `wait` before a file is flushed, `tear` in a row of metrics."""
    fsync, append = os.fsync, log.RunLog._append

    def faulty_fsync(fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        path = str(Path(f"/proc/self/fd/{number}").readlink())
        for fault in faults:
            if fault.get("file", "\0") in path and is_first_time(fault):
                if fault["do"] == "kill":
                    os.ftruncate(number, os.fstat(number).st_size // 2)
                wait_or_kill(fault)
        fsync(fd)

    def faulty_append(self: log.RunLog, path: Path, row: Any) -> None:
        for fault in (fault for fault in faults if fault["do"] == "tear"):
            if "learning_rate" in row and row["step"] == fault["step"] and is_first_time(fault):
                with path.open("ab") as file:
                    file.write(json.dumps(row).encode()[:25])
                os.kill(os.getpid(), signal.SIGKILL)
        append(self, path, row)

    os.fsync = faulty_fsync
    log.RunLog._append = faulty_append  # type: ignore[method-assign]


def record_decisions() -> None:
    """Append each decision of this rank's spike detector to `decisions-RANK.jsonl`."""
    check = SpikeDetector.check
    path = Path(f"decisions-{os.environ.get('RANK', '0')}.jsonl")

    def recorded_check(self: SpikeDetector, loss: float, norm: float) -> Decision:
        decision = check(self, loss, norm)
        with path.open("a") as file:
            file.write(json.dumps([str(loss), str(norm), decision.action.value, *decision[1:]]) + "\n")
        return decision

    SpikeDetector.check = recorded_check  # type: ignore[method-assign]


def main() -> int:
    from tinyllama.__main__ import main as tinyllama

    faults: list[Fault] = json.loads(os.environ.get("FAULTS", "[]"))
    hardware.peak_flops = lambda device, precision: None  # measuring it takes longer than a run of these tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    record_decisions()
    inject_into_losses(faults)
    inject_into_files(faults)
    return tinyllama()


if __name__ == "__main__":
    sys.exit(main())
