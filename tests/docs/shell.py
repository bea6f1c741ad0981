"""A real shell for a page's commands, in which the project's programs are at hand at once.

`tinyllama`, `torchrun`, `python` and the like are found in a folder of `program.py` under their names, which hands them
to one process that has imported everything (`readied.py`). All else is the system's own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docs.rules import PROGRAMS

HERE = Path(__file__).parent
LIMIT_SECONDS = 120


@dataclass(frozen=True)
class Shell:
    """Where the programs, their socket and their log lie."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def commands(self) -> list[dict[str, Any]]:
        """Every command so far: as it was given, and the rule by which it was not carried out."""
        return [entry for line in self.log.read_text().splitlines() if "entry" in (entry := json.loads(line))]

    def enter(self, folder: Path) -> None:
        """Have `.venv/bin/` in a folder, as a checkout has."""
        (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (folder / ".venv/bin/activate").touch()
        for name in PROGRAMS:
            (folder / ".venv/bin" / name).symlink_to(self.folder / "bin" / name)

    def run(self, script: str, folder: Path) -> str:
        """Run a script to its end; what it printed. A command that fails is an AssertionError with what it said.

        Variables and the working folder last from one script to the next in the same folder, as in a reader's shell.
        """
        state = folder / ".shell-state"
        after = f"set +u\n{{ declare -px; echo cd $PWD; }} > {state}"
        whole = f"[ ! -f {state} ] || source {state}\nset -eu\n{script}\n{after}\n"
        done = subprocess.run(
            ["bash", "-c", whole],
            check=False, cwd=folder, env=self.variables(), capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"status {done.returncode} of\n{script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def variables(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "CI") if name in os.environ}
        return kept | {
            "PATH": f"{self.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "DOCS_SOCKET": str(self.folder / "socket"),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": "none",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
        }


@contextmanager
def started(folder: Path) -> Iterator[Shell]:
    """A shell whose programs answer until the block ends."""
    shell = Shell(folder)
    (folder / "bin").mkdir()
    shell.log.touch()
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.write_text(f"#!{sys.executable} -SE\n{(HERE / 'program.py').read_text()}")
        program.chmod(0o755)
    command = [sys.executable, "-m", "tests.docs.readied", str(folder / "socket"), str(shell.log)]
    variables = os.environ | shell.variables()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, cwd=HERE.parents[1]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield shell
        finally:
            process.kill()
