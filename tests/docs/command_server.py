"""Server of the documentation tests: imports everything once, and forks for each command of a page's shell.

`python -m tests.docs.command_server SOCKET LOG`: each line of LOG is a command and the rule that excluded it.
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
import traceback
import webbrowser
from pathlib import Path

from tests import engine_server
from tests.docs import rules
from torch.distributed.run import get_args_parser

from tinyllama import cli
from tinyllama.recipe import bundled_recipes
from tinyllama.release import engines

ROOT = Path(__file__).parents[2]
SLOW_IMPORTS = (
    "lm_eval.models.huggingface",
    "tinyllama.prepare.pipeline",
    "tinyllama.prepare.selection",
    "tinyllama.plan.doctor",
    "tinyllama.evaluate.harness",
    "tinyllama.evaluate.evaluation",
    "tinyllama.evaluate.tasks",
    "tinyllama.plan.show",
    "tinyllama.release.release",
    "tinyllama.release.verify",
    "tinyllama.report.page",
    "tinyllama.tracking.watch",
    "tinyllama.train.loop",
    "transformers",
)
LOG = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.devnull)


def serve(address: str) -> None:
    """Fork for each connection, until the process is killed."""
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
    """Run the requested command in this forked process, send its status, and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    request = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    status = 1
    try:
        status = run(request["words"])
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
    """Run a command, or only check it if a rule excludes it; return its exit status."""
    program, arguments = words[0].replace("python3", "python"), words[1:]
    command = " ".join([program, *arguments])
    rule = rules.exclusion(command)
    with LOG.open("a") as log:
        log.write(json.dumps({"command": command, "excluded": rule and rule.pattern}) + "\n")
    if rule:
        return check_arguments(program, arguments) if rule.check == "parsed" else 0
    match [program, *arguments]:
        case ["tinyllama", *rest] | ["python", "-m", "tinyllama", *rest]:
            return run_tinyllama(rest)
        case ["torchrun", *rest]:
            return run_torchrun(rest)
        case ["python", "--snippet", path]:
            runpy.run_path(path, run_name="__main__")
            return 0
        case ["python", *rest]:
            return subprocess.run([sys.executable, *rest], check=False).returncode
    return fail(f"{program}: no way to run this; see tests/docs/rules.py")


def fail(message: str) -> int:
    """Print a message; return the status 69."""
    print(message, file=sys.stderr)
    return 69


def run_tinyllama(words: list[str]) -> int:
    """Run the command line with smaller values; `watch` ends when its page would be opened."""
    webbrowser.open = press_ctrl_c  # type: ignore[assignment]
    if words[:1] == ["plan"] and words[1] in bundled_recipes():
        os.chdir(tempfile.mkdtemp())  # the pages plan before any data exists
    status = verify_once(words) if words[:1] == ["verify"] else cli.main(rules.scaled(words))
    machine_lacks_something = words[:1] == ["doctor"] and status == 1
    watch_was_interrupted = words[:1] == ["watch"] and status == 130
    return 0 if machine_lacks_something or watch_was_interrupted else status


def verify_once(words: list[str]) -> int:
    """Verify a release, or repeat the output for a release with the same files: six engines take long."""
    release = (Path(words[1]) / "release.json").read_bytes()
    known = LOG.with_name(f"{hashlib.sha256(release).hexdigest()}.json")
    if not known.exists():
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            status = cli.main(words)
        known.write_text(json.dumps([status, output.getvalue()]))
    status, text = json.loads(known.read_text())
    print(text, end="")
    return int(status)


def press_ctrl_c(address: str) -> None:
    """Interrupt this process, in place of opening a browser."""
    os.kill(os.getpid(), signal.SIGINT)


def run_torchrun(words: list[str]) -> int:
    """Parse torchrun's flags with its own parser; run one rank."""
    given = get_args_parser().parse_args(words)
    if not given.module or given.training_script != "tinyllama":
        return fail(f"torchrun of {given.training_script}: no way to run this; see tests/docs/rules.py")
    return run_tinyllama(given.training_script_args)


def check_arguments(program: str, words: list[str]) -> int:
    """Check the arguments of an excluded command with its own parser, or the existence of the files that it names."""
    if program == "tinyllama":
        cli.parse_command(words)
        return 0
    if program == "make":
        return subprocess.run(
            ["/usr/bin/make", "-n", *words], check=False, cwd=ROOT, stdout=subprocess.DEVNULL
        ).returncode
    if program == "python" and words[0].startswith("benchmarks/"):
        known = set(re.findall(r"--[\w-]+", help_of_benchmark(words[0])))
        unknown = [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in known]
        return fail(f"{words[0]} has no {', '.join(unknown)}") if unknown else 0
    missing = [word for word in words if "/" in word and not Path(word).exists()]
    return fail(f"{program}: there is no {', '.join(missing)}") if missing and program != "hf" else 0


def help_of_benchmark(path: str) -> str:
    """Return a benchmark's help."""
    output = io.StringIO()
    sys.argv = [path, "--help"]
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return output.getvalue()


if __name__ == "__main__":
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    engine_server.start()
    engines._run = engine_server.run_in_fork
    serve(sys.argv[1])
