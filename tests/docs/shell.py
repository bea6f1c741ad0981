"""A real shell for the commands of a page, whose programs are forks of a process with all imports done.

`tinyllama`, `torchrun`, `python` and others are copies of command_client.py under these names. They run run_command.py
on the fork server. All other programs are the system's.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.docs.rules import PROGRAMS
from tests.fork_server import start_server

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 120
SLOW_IMPORTS = (
    "lm_eval.models.huggingface",
    "tests.docs.run_command",
    "tinyllama.evaluate.evaluation",
    "tinyllama.evaluate.tasks",
    "tinyllama.plan.doctor",
    "tinyllama.plan.show",
    "tinyllama.prepare.pipeline",
    "tinyllama.prepare.selection",
    "tinyllama.release.release",
    "tinyllama.release.verify",
    "tinyllama.report.live",
    "tinyllama.train.loop",
)


@dataclass(frozen=True)
class Shell:
    """A folder with the programs, and the address of the fork server."""

    programs: Path
    server: str

    @classmethod
    def start(cls, folder: Path) -> "Shell":
        """Start the server, and install the programs in a folder."""
        for name in PROGRAMS:
            (folder / name).write_text(f"#!{sys.executable} -SE\n{(HERE / 'command_client.py').read_text()}")
            (folder / name).chmod(0o755)
        return cls(folder, start_server(*SLOW_IMPORTS))

    def install(self, folder: Path) -> None:
        """Create `.venv/bin/` in a folder, as in a checkout."""
        (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (folder / ".venv/bin/activate").touch()
        for name in PROGRAMS:
            (folder / ".venv/bin" / name).symlink_to(self.programs / name)

    def run(self, script: str, folder: Path) -> str:
        """Run a script and return its output. Raises AssertionError with the output if a command fails.

        Variables and the working folder persist between scripts in the same folder, as in a reader's shell.
        """
        state = folder / ".shell-state"
        save = f"set +u\n{{ declare -px; echo cd $PWD; }} > {state}"
        program = f"[ ! -f {state} ] || source {state}\nset -eu\n{script}\n{save}\n"
        variables = {name: os.environ[name] for name in ("HOME", "LANG", "CI") if name in os.environ} | {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "DOCS_SERVER": self.server,
            "DOCS_PROGRAM": str(HERE / "run_command.py"),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": "none",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", program],
            check=False, cwd=folder, env=variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"status {done.returncode} of\n{script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr
