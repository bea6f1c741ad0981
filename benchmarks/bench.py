"""`make bench`: all comparisons with peers, in one run on one machine, written to docs/benchmarks.{json,md,png}.

Each section is a separate script. The scripts run one after the other, so that no two scripts share the cores. The page
and the plot depend only on the JSON file, so --page can write them again. If a section fails, the files in docs are not
changed, because all their results must come from one run. Peers, text and compiled code are cached under --work.

    python benchmarks/bench.py
    python benchmarks/bench.py --only loading starting --rounds 1      # a quick test, written under --work
    python benchmarks/bench.py --page docs/benchmarks.json
"""

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from os import getloadavg
from pathlib import Path

import torch
from bench_page import write_page
from measuring import Measure, Results, machine, options, read_measures, read_results

from tinyllama.files import write_json
from tinyllama.hardware import available_cpu_count, benchmark_matmul_flops

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SECTIONS = {
    "tokenization": ("prepare.py", "--megabytes", "30", "--copies", "0"),
    "deduplication": ("deduplication.py",),
    "cleaning": ("cleaning.py",),
    "loading": ("loading.py", "--megatokens", "200"),
    "resuming": ("resuming.py", "--megatokens", "20", "200"),
    "training": (
        *("training.py", "--steps", "7", "--warmup", "3"),
        *("--only", "tinyllama", "transformers", "litgpt bf16-true", "torchtitan"),
    ),
    "evaluation": ("evaluation.py", "--precision", "bf16", "--items", "24"),
    "starting": ("starting.py",),
    "quality": ("quality.py",),
}
ON_REQUEST = {"quality"}
"""Sections that run only if --only names them: three rounds take more than two hours."""
THREADED = {"training", "evaluation", "starting", "quality"}
SECONDS = {
    "tokenization": (30, 115),
    "deduplication": (60, 90),
    "cleaning": (30, 30),
    "loading": (45, 5),
    "resuming": (100, 15),
    "training": (0, 170),
    "evaluation": (70, 25),
    "starting": (70, 60),
    "quality": (600, 2900),
}
"""Estimated seconds of a section before its rounds, and per round, on two idle cores with all packages installed."""


def main() -> None:
    """Run the sections and write the page."""
    arguments = parse_arguments()
    if arguments.page:
        write_page(read_results(arguments.page), arguments.into or arguments.page.parent)
        return
    sections = arguments.only or [name for name in SECTIONS if name not in ON_REQUEST]
    seconds = sum(SECONDS[name][0] + SECONDS[name][1] * arguments.rounds for name in sections)
    print(f"{', '.join(sections)}: about {seconds / 60:.0f} minutes on two idle cores, after the installation of peers")
    into = arguments.into or (arguments.work / "look" if arguments.only else DOCS)
    into.mkdir(parents=True, exist_ok=True)
    results = measure(sections, arguments)
    write_json(into / "benchmarks.json", results.model_dump())
    write_page(results, into)
    print(f"{into / 'benchmarks.md'}: written; {results.seconds / 60:.1f} minutes")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, rounds=3)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"sections to run: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--into", type=Path, help="folder of the page (default: docs, or WORK/look with --only)")
    parser.add_argument(
        "--threads", type=int, default=available_cpu_count(), help="threads per threaded program (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, help="write the page of this results file without measuring")
    return parser.parse_args()


def measure(sections: list[str], arguments: argparse.Namespace) -> Results:
    """Run the sections; measure the machine's speed before each section and after the last."""
    torch.set_num_threads(available_cpu_count())
    begun, measures = time.perf_counter(), list[Measure]()
    products, loads = [product()], [getloadavg()[0]]
    for name in sections:
        measures += run(name, arguments)
        products.append(product())
        loads.append(getloadavg()[0])
    return Results(
        date=datetime.now(UTC).date().isoformat(),
        seconds=time.perf_counter() - begun,
        machine=machine(products, loads),
        measures=measures,
    )


def product() -> float:
    """Measure a bf16 2048^3 matrix product on all cores; return its GFLOP/s."""
    return benchmark_matmul_flops(torch.bfloat16) / 1e9


def run(name: str, arguments: argparse.Namespace) -> list[Measure]:
    """Run a section and return its measures."""
    out = arguments.work.resolve() / "bench" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    script, *flags = SECTIONS[name]
    flags += ["--threads", str(arguments.threads)] if name in THREADED else []
    rounds = arguments.rounds * (5 if name == "loading" else 1)  # a turn of loading takes only 0.1 s
    print(f"\n{name}", flush=True)
    begun = time.perf_counter()
    command = [sys.executable, HERE / script, *flags, "--work", arguments.work, "--rounds", rounds, "--json", out]
    status = subprocess.run(list(map(str, command)), check=False).returncode
    if status:
        raise SystemExit(f"{name}: exit status {status}; no results are written")
    print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return read_measures(out)


if __name__ == "__main__":
    main()
