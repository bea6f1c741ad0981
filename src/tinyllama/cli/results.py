"""Commands that show runs and score models."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tinyllama.cli.next_command import after_evaluation, echo_next
from tinyllama.formatting import echo, print_json, stdout_to_stderr

# Each command imports its modules when it runs, so that `tinyllama --help` does not wait for torch.
# ruff: noqa: PLC0415


def runs(folder: Positional[Annotated[Path, arg(metavar="FOLDER")]] = Path("runs"), json: bool = False) -> None:
    """List the runs in a folder, with state and progress.

    The table shows step, loss, speed, remaining time, last checkpoint and releases.

    Examples:
        tinyllama runs
        tinyllama runs experiments --json

    Args:
        folder: Folder that contains the run folders.
        json: Print the runs as JSON.
    """
    from tinyllama.runs.listing import list_runs, runs_as_json

    if json:
        print_json(runs_as_json(folder))
        return
    print("\n".join(list_runs(folder)))  # noqa: T201 - echo would escape the colours


def watch(
    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN ...")]] = (),
    port: int | None = None,
    browser: bool = True,
) -> None:
    """Serve the report of a run as a live page on this machine.

    The page grows while the run trains. It is served until the command is interrupted.

    Examples:
        tinyllama watch
        tinyllama watch runs/mine runs/other --port 8100 --no-browser

    Args:
        runs: Folders of runs: the first is shown, compared with the others; by default the newest run in `runs`.
        port: Port of the page; a free one by default.
        browser: Do not open the page in a browser.
    """
    from tinyllama.report.live import watch as serve

    serve(runs, port, browser)


def report(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    compare: Annotated[tuple[Path, ...], arg(metavar="RUN ...")] = (),
    output: Path | None = None,
) -> None:
    """Write a run's report to one HTML file.

    The file has curves, scores, recipe, data, events and releases, and needs no network.

    Examples:
        tinyllama report runs/mine
        tinyllama report runs/mine --compare runs/other runs/third

    Args:
        run: Folder of the run.
        compare: Other runs to plot for comparison.
        output: Output file; RUN/report.html by default.
    """
    from tinyllama.report.page import write_report

    echo(f"report: {write_report(run, compare, output)}")


def evaluate(
    model: Positional[Annotated[str, arg(metavar="MODEL")]],
    tasks: Annotated[tuple[str, ...], arg(metavar="TASK ...")] = ("hellaswag",),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    json: bool = False,
) -> None:
    """Score a model on lm-eval tasks.

    The scores are saved in evaluation.json next to the model. Under torchrun, all ranks share the work.

    Examples:
        tinyllama evaluate runs/mine
        tinyllama evaluate runs/mine --tasks hellaswag piqa --limit 200

    Args:
        model: A run, a checkpoint, a release, or a Hugging Face folder or hub name.
        tasks: Names of lm-eval tasks.
        limit: Number of items to score per task, from the first item on; all items by default.
        num_fewshot: Number of few-shot examples before each item; by default the task's own number, usually 0.
        batch_size: Batch size of lm-eval's `hf`, which runs all models except supported Llamas.
        precision: Precision of the computation. fp16 replaces bf16 on GPUs without bf16; fp32 replaces fp16 on CPUs.
        json: Print the scores as JSON.
    """
    from tinyllama.api import evaluate_model
    from tinyllama.evaluate.results import format_evaluation

    with stdout_to_stderr(json):
        result = evaluate_model(
            model, tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, precision=precision
        )
    if result is None:  # on all ranks except rank 0
        return
    if json:
        print_json(asdict(result.evaluation) | {"saved": str(result.path)})
    else:
        echo("\n".join([*format_evaluation(result.evaluation), f"saved: {result.path}"]))
        echo_next(after_evaluation(model, result.path))
