"""A process that has imported what takes long, and forks for each command that a page's shell calls.

`python -m tests.docs.readied SOCKET LOG`: each line of LOG is a command, as it was asked for and as it was run.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import webbrowser
from pathlib import Path
from typing import Any

from tests import engine_server
from tests.docs import rules
from torch.distributed.run import get_args_parser

from tinyllama import cli
from tinyllama.recipe import bundled_recipes
from tinyllama.release import isolation

ROOT = Path(__file__).parents[2]
SLOW_IMPORTS = (
    "lm_eval.models.huggingface",
    "tinyllama.prepare.pipeline",
    "tinyllama.prepare.sample",
    "tinyllama.plan.doctor",
    "tinyllama.evaluate.harness",
    "tinyllama.evaluate.report",
    "tinyllama.evaluate.tasks",
    "tinyllama.plan.command",
    "tinyllama.release.command",
    "tinyllama.release.verify",
    "tinyllama.report",
    "tinyllama.tracking.watch",
    "tinyllama.train.loop",
    "transformers",
)
LOG = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.devnull)


def serve(address: str) -> None:
    """Fork for each command until the socket's folder is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                answer(connection)
            connection.close()


def answer(connection: socket.socket) -> None:
    """In the child: become the command, say its status, end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    asked = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    status = 1
    try:
        status = run(asked["words"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        connection.sendall(str(status).encode())
        os._exit(0)


def run(words: list[str]) -> int:
    """Run a command by the rules; its exit status."""
    program, rest = words[0].replace("python3", "python"), words[1:]
    command = " ".join([program, *rest])
    entry = rules.not_run(command)
    note(command=command, entry=entry and entry.pattern)
    if entry:
        return parsed(program, rest) if entry.how == "parsed" else 0
    return carried_out(program, rest)


def carried_out(program: str, words: list[str]) -> int:
    """Do what a command says."""
    match program, *words:
        case ["tinyllama", *rest] | ["python", "-m", "tinyllama", *rest]:
            return run_tinyllama(rest)
        case ["torchrun", *rest]:
            return run_torchrun(rest)
        case ["python", "--snippet", path]:
            runpy.run_path(path, run_name="__main__")
            return 0
        case ["python", *rest]:
            return subprocess.run([sys.executable, *rest], check=False).returncode
    return complain(f"{program}: no way to run this; see tests/docs/rules.py")


def note(**what: Any) -> None:
    with LOG.open("a") as log:
        log.write(json.dumps(what) + "\n")


def complain(message: str) -> int:
    print(message, file=sys.stderr)
    return 69


def run_tinyllama(words: list[str]) -> int:
    """The command line itself, made small; `watch` until its page is opened."""
    webbrowser.open = end_by_ctrl_c  # type: ignore[assignment]
    if words[:1] == ["plan"] and words[1] in bundled_recipes():
        os.chdir(tempfile.mkdtemp())  # it is asked before anything is there
    begun = time.monotonic()
    status = verify_once(words) if words[:1] == ["verify"] else cli.main(rules.scaled(words))
    note(command=f"tinyllama {' '.join(words)}", seconds=time.monotonic() - begun)
    is_judgement = words[:1] == ["doctor"] and status == 1  # of this machine, which no page speaks of
    is_ended = words[:1] == ["watch"] and status == 130
    return 0 if is_judgement or is_ended else status


def verify_once(words: list[str]) -> int:
    """Verify a release, or say what was said of one with the same files, since six engines take their time."""
    release = (Path(words[1]) / "release.json").read_bytes()
    known = LOG.with_name(f"{hashlib.sha256(release).hexdigest()}.json")
    if not known.exists():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = cli.main(words)
        known.write_text(json.dumps([status, said.getvalue()]))
    status, text = json.loads(known.read_text())
    print(text, end="")
    return int(status)


def end_by_ctrl_c(address: str) -> None:
    """What this browser does with a page."""
    os.kill(os.getpid(), signal.SIGINT)


def run_torchrun(words: list[str]) -> int:
    """torchrun's own parser reads its flags; then one rank alone does what many would."""
    given = get_args_parser().parse_args(words)
    if not given.module or given.training_script != "tinyllama":
        return complain(f"torchrun of {given.training_script}: no way to run this; see tests/docs/rules.py")
    return run_tinyllama(given.training_script_args)


def parsed(program: str, words: list[str]) -> int:
    """Have a command read by its own parser and nothing done."""
    match program:
        case "tinyllama":
            cli._command(words)
            return 0
        case "make":
            return subprocess.run(
                ["/usr/bin/make", "-n", *words], check=False, cwd=ROOT, stdout=subprocess.DEVNULL
            ).returncode
        case "python" if words[0].startswith("benchmarks/"):
            return takes(words, help_of_benchmark(words[0]))
        case "hf":
            hf = [str(Path(sys.executable).with_name("hf")), words[0], "--help"]
            return takes(["hf", *words], subprocess.run(hf, check=True, capture_output=True, text=True).stdout)
    lost = [word for word in words if "/" in word and not Path(word).exists()]
    return complain(f"{program}: there is no {', '.join(lost)}") if lost else 0


def help_of_benchmark(path: str) -> str:
    """What a benchmark says of its flags."""
    said = io.StringIO()
    sys.argv = [path, "--help"]
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return said.getvalue()


def takes(words: list[str], said: str) -> int:
    """Whether a program's help knows each flag."""
    known = set(re.findall(r"--[\w-]+", said))
    unknown = [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in known]
    return complain(f"{words[0]} has no {', '.join(unknown)}") if unknown else 0


if __name__ == "__main__":
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    engine_server.start()
    isolation._run = engine_server.run_in_fork
    serve(sys.argv[1])
