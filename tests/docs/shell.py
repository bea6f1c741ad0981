"""A real shell for the commands of a page, whose programs are forks of a process with all imports done.

`tinyllama`, `torchrun`, `python` and others are copies of command_client.py under these names; they forward their
arguments to command_server.py. All other programs are the system's.
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
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Shell:
    """A folder with the programs, their socket and their log."""

    folder: Path

    def commands(self) -> list[dict[str, Any]]:
        """Return every command so far, with the rule that excluded it."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]

    def install(self, folder: Path) -> None:
        """Create `.venv/bin/` in a folder, as in a checkout."""
        (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (folder / ".venv/bin/activate").touch()
        for name in PROGRAMS:
            (folder / ".venv/bin" / name).symlink_to(self.folder / "bin" / name)

    def run(self, script: str, folder: Path) -> str:
        """Run a script and return its output. Raises AssertionError with the output if a command fails.

        Variables and the working folder persist between scripts in the same folder, as in a reader's shell.
        """
        state = folder / ".shell-state"
        save = f"set +u\n{{ declare -px; echo cd $PWD; }} > {state}"
        program = f"[ ! -f {state} ] || source {state}\nset -eu\n{script}\n{save}\n"
        done = subprocess.run(
            ["bash", "-c", program],
            check=False, cwd=folder, env=self.variables(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"status {done.returncode} of\n{script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def variables(self) -> dict[str, str]:
        """Return the environment of the commands."""
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
    """Start the server; yield a shell whose programs use it."""
    shell = Shell(folder)
    (folder / "bin").mkdir()
    (folder / "log.jsonl").touch()
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.write_text(f"#!{sys.executable} -SE\n{(HERE / 'command_client.py').read_text()}")
        program.chmod(0o755)
    command = [sys.executable, "-m", "tests.docs.command_server", str(folder / "socket"), str(folder / "log.jsonl")]
    variables = os.environ | shell.variables()
    if "PYTHONPATH" in os.environ:
        variables["PYTHONPATH"] = os.environ["PYTHONPATH"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, cwd=HERE.parents[1]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield shell
        finally:
            process.kill()
