"""Recorder of docs/tour.md: `python -m tools.tour FOLDER --origin "the documentation of …" --minutes 3`.

The recorder copies the folder to a scratch folder, runs the commands of the tour there, takes screenshots of the live
page while the model trains, and writes the page with the output of the commands. Only absolute paths are changed, and
a line with … replaces the middle of long output.
"""

import argparse
import code
import contextlib
import datetime
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from tinyllama import Run
from tinyllama.formatting import format_bytes
from tinyllama.hardware import available_cpu_count, device_name

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs/tour.md", ROOT / "docs/assets"
FOLDER = "docs"  # name of the copied folder, of the recipe, and of the run
MAX_LINES, LAST_LINES = 160, 60
"""Output with more lines is shortened to this number; the number of lines kept at its end."""
MOMENTS = {
    1: (0.2, "early in training", "body"),
    2: (0.6, "in the middle of training", "#section-loss"),
    3: (None, "after all stages", "#section-samples"),
}
"""Screenshots by number: the fraction of all steps after which they are taken, the words for it, and the element at
which the narrow one begins; a phone's screen shows only a part of the page."""
SIZES = {"wide": (1280, 1000), "narrow": (390, 844)}
PICTURE_HEIGHT = 375  # on the page, in CSS pixels: both pictures of a moment are in one row
SESSION = (
    "import tinyllama",
    'run = tinyllama.Run.open("runs/docs")',
    "run",
    "print(run.recipe)",
    "list(run.metrics)",
    'run.metrics["loss"][[0, -1]]',
    "[checkpoint.step for checkpoint in run.checkpoints]",
    'samples = [event for event in run.events if event["event"] == "sample"]',
    'samples[0]["step"], samples[-1]["step"], samples[-1]["prompt"]',
    'samples[0]["greedy"]',
    'samples[-1]["greedy"]',
    "model, tokenizer = run.model(), run.tokenizer()",
    "model.num_parameters, tokenizer",
    'tokenizer.encode("The documentation")',
    'print(tinyllama.generate_text(run, "The command", 40, temperature=0.7, seed=1))',
)


def main() -> None:
    """Record the tour, and write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of documentation")
    parser.add_argument("--origin", required=True, help="words for the folder, such as `the documentation of Git`")
    parser.add_argument("--minutes", type=float, default=3, help="time for training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        shutil.copytree(arguments.folder, FOLDER, symlinks=True)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        PAGE.write_text("\n".join(page(arguments.origin, arguments.minutes)), encoding="utf-8")


def page(origin: str, minutes: float) -> Iterator[str]:
    """Record each part of the tour, and yield its Markdown."""
    files = [path for path in Path(FOLDER).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    yield "# A tour: from a folder of files to a model\n"
    yield prose(f"""
        `tools/tour.py` recorded this page on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, with
        {available_cpu_count()} cores ({device_name(torch.device("cpu"))}). The folder `{FOLDER}` is {origin}:
        {len(files):,} files, {format_bytes(size)}. No file was edited for the tour. The output is what the commands
        print to a pipe; on a terminal, progress is a bar. In long output, a line with … replaces the middle.""")
    yield from ("## A recipe for the folder\n", console(f"tinyllama init {FOLDER} --minutes {minutes:g}"))
    yield from ("The recipe has comments with the reasons:\n", console(f"cat {FOLDER}.yaml"))
    command = f"tinyllama run {FOLDER}.yaml"
    yield from ("## All stages\n", block("console", f"$ {command}\n{run_and_photograph(shlex.split(command))}"))
    yield from ("The run in the list of runs:\n", console("tinyllama runs"))
    yield "## The live page\n"
    yield prose(f"""
        `tinyllama watch runs/{FOLDER}` served this page during the run. Each picture is one screen of a desktop or a
        phone. Select a picture to see it in its full size.""")
    for number, (_, words, _) in MOMENTS.items():
        yield f"### {words[0].upper()}{words[1:]}\n"
        for name, (width, height) in SIZES.items():
            alt, path = f"The live page {words}, {width} pixels wide", f"assets/live-{number}-{name}.png"
            yield f'[![{alt}]({path}){{ width="{width * PICTURE_HEIGHT // height}" }}]({path})'
        yield ""
    yield "## Text from the model\n"
    yield console(f'tinyllama generate runs/{FOLDER} "The command" --seed 1 --max-new-tokens 60')
    yield console(f'tinyllama generate runs/{FOLDER} "## Class" --seed 2 --max-new-tokens 60 --num-samples 2')
    yield from ("## Python\n", block("pycon", python_session(SESSION)))
    yield "## Help\n"
    for command in ("init", "run", "generate"):
        yield console(f"tinyllama {command} --help")
    yield "Next: [your own data](own-data.md), [watching a run](watching.md), [the Python API](python.md).\n"


def prose(text: str) -> str:
    """Return a paragraph with lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def console(command: str) -> str:
    """Run a command, and return the block with the command and its output. Raises CalledProcessError if it fails."""
    done = subprocess.run(
        shlex.split(command), check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return block("console", f"$ {command}\n{done.stdout.decode()}")


def block(language: str, text: str) -> str:
    """Return a fenced block with relative paths, without the middle of long text."""
    lines = [line.rstrip() for line in text.replace(f"{Path.cwd()}/", "").replace(str(Path.home()), "~").splitlines()]
    if len(lines) > MAX_LINES:
        first = MAX_LINES - LAST_LINES
        lines[first:-LAST_LINES] = [f"… ({len(lines) - MAX_LINES} lines)"]
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", text))])
    return "\n".join([f"{fence}{language}", *lines, fence, ""])


def run_and_photograph(command: Sequence[str]) -> str:
    """Run all stages, take the screenshots of the live page, and return the output of the stages."""
    run, output = Path("runs") / FOLDER, Path("output.txt")
    with output.open("wb") as file, contextlib.ExitStack() as at_end:
        stages = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        at_end.callback(stages.terminate)  # in case of an error in this function
        while not (run / "metrics.jsonl").exists() and stages.poll() is None:
            time.sleep(0.5)
        address = at_end.enter_context(live_page(run))
        for number, (fraction, _, element) in MOMENTS.items():
            while stages.poll() is None and (fraction is None or progress(run) < fraction):
                time.sleep(0.5)
            for name in SIZES:
                take_screenshot(address, name, element, PICTURES / f"live-{number}-{name}.png")
    if stages.returncode:
        raise SystemExit(f"{shlex.join(command)}: status {stages.returncode}\n{output.read_text()}")
    return output.read_text()


def take_screenshot(address: str, name: str, element: str, path: Path) -> None:
    """Save a screen of a page in one of SIZES; the narrow one begins at an element."""
    (width, height), is_phone = SIZES[name], name == "narrow"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=is_phone, has_touch=is_phone)
        page.goto(address)
        if is_phone:
            page.locator(element).first.evaluate("element => element.scrollIntoView()")
        picture = Image.open(io.BytesIO(page.screenshot()))
    picture.quantize(256).save(path, optimize=True)  # half the size


@contextlib.contextmanager
def live_page(run: Path) -> Iterator[str]:
    """Serve the live page of a run with `tinyllama watch`, and yield its address."""
    command = ["tinyllama", "watch", str(run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        found = re.search(r"http://\S+", server.stdout.readline() if server.stdout else "")
        assert found, "tinyllama watch printed no address"
        try:
            yield found[0]
        finally:
            server.terminate()


def progress(run: Path) -> float:
    """Return the fraction of a run's steps that are complete."""
    opened_run = Run.open(run)
    return float(max(opened_run.metrics["step"], default=0)) / opened_run.recipe.train.steps


def python_session(statements: Sequence[str]) -> str:
    """Run statements as in Python's interactive mode; return the session with its prompts."""
    session, interpreter = io.StringIO(), code.InteractiveInterpreter()
    with contextlib.redirect_stdout(session), contextlib.redirect_stderr(session):
        for statement in statements:
            print(f">>> {statement}")
            interpreter.runsource(statement)
    return session.getvalue()


if __name__ == "__main__":
    main()
