"""Program that runs a command of a page, with smaller values, or only checks it: `run_command.py PROGRAM ARGUMENTS`."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path

from tests.docs import rules
from torch.distributed.run import get_args_parser

from tinyllama import cli
from tinyllama.recipe import bundled_recipes

ROOT = Path(__file__).parents[2]


def run(program: str, arguments: list[str]) -> int:
    """Run a command, or only check it if a rule excludes it; return its exit status."""
    if rule := rules.exclusion(" ".join([program, *arguments])):
        print(rules.EXCLUDED_MARK, rule.reason, file=sys.stderr)
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    os.environ["BROWSER"] = "none"  # without a display, `watch` would not open its page
    webbrowser.open = lambda address: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[assignment, misc]
    if words[:1] == ["plan"] and words[1] in bundled_recipes():
        os.chdir(tempfile.mkdtemp())  # the pages plan before any data exists
    status = cli.main(rules.scaled(words))
    machine_lacks_something = words[:1] == ["doctor"] and status == 1
    watch_was_interrupted = words[:1] == ["watch"] and status == 130
    return 0 if machine_lacks_something or watch_was_interrupted else status


def run_torchrun(words: list[str]) -> int:
    """Parse torchrun's flags with its own parser; run one rank."""
    given = get_args_parser().parse_args(words)
    if not given.module or given.training_script != "tinyllama":
        return fail(f"torchrun of {given.training_script}: no way to run this; see tests/docs/rules.py")
    return run_tinyllama(given.training_script_args)


def check_arguments(program: str, words: list[str]) -> int:
    """Check the arguments of an excluded command with its own parser, or the existence of what they name."""
    if program == "tinyllama":
        cli.parse_command(words)
        return 0
    if program == "make":
        return subprocess.run(
            ["/usr/bin/make", "-n", *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
        ).returncode
    missing = [word for word in words if "/" in word and not Path(word).exists() and program != "hf"]
    if program == "python" and words[0].startswith("benchmarks/"):
        source = (ROOT / words[0]).read_text()
        missing += [word for word in words[1:] if word.startswith("--") and word.partition("=")[0] not in source]
    return fail(f"{program}: there is no {', '.join(missing)}") if missing else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1].replace("python3", "python"), sys.argv[2:]))
