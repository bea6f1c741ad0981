"""Reads sparse files of 2 GB in a process with 1.5 GB of address space; prints the results."""

import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.files import rows_since
from tinyllama.runs.log import RunLog
from tinyllama.runs.run_dir import RunDir
from tinyllama.tokenizer import Tokenizer

SIZE = 2 << 30


def main(folder: str) -> None:
    run = RunDir(Path(folder))
    for name in ("tokenizer.json", "tokenizer.model"):
        path = run.path / name
        write_sparse(path)
        print_error(partial(Tokenizer.load, path))
        path.unlink()
    run.metrics_path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    write_sparse(run.metrics_path)
    with run.metrics_path.open("ab") as file:
        file.write(b"\n")
    print_error(lambda: list(run.metrics()))
    print_error(lambda: rows_since(run.metrics_path, 0))
    log = RunLog(run)
    log.drop_partial_lines()
    log.truncate_after(3)
    print("steps", [row["step"] for row in run.metrics()])


def write_sparse(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(SIZE)


def print_error(call: Callable[[], object]) -> None:
    try:
        print(call())
    except InputError as error:
        print(Path(str(error)).name.partition(";")[0])


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
    main(sys.argv[1])
