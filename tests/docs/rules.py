"""How a page's command is run here: smaller than the page says, in part, or not at all; and where else it is tested.

A page speaks of runs of days. Here the same words go to the same program, with a tiny model and little data.
"""

import re
from dataclasses import dataclass

from tinyllama.recipe import bundled_recipes

STEP = "step-00000008"
"""The last step of every run here, whatever a page calls its own."""
SHAPE = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128, "context_length": 64}
TRAINING = {
    **{f"model.{name}": value for name, value in SHAPE.items()},
    "model.norm_eps": 1e-5,
    "model.rope_theta": 10000,
    "model.tie_embeddings": "true",
    "train.sequence_length": 32,
    "train.batch_sequences": 4,
    "train.micro_batch_sequences": 4,
    "train.precision": "fp32",
    "train.compile": "false",
    "parallel.replicate": 1,
    "train.tokens": 8 * 4 * 32,
    "train.schedule.warmup_steps": 2,
    "train.validate_every_steps": 8,
    "train.validation_sequences": 4,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 8,
    "release.at_tokens": "[]",
    "release.every_tokens": "null",
    "track.trackio": "false",
}
PREPARING = {"data.workers": 1, "data.executor": "local", "data.validation_fraction": 0.2}


@dataclass(frozen=True)
class NotRun:
    """Commands that are not carried out here: why, how far they are checked, and the test that carries them out."""

    pattern: str
    why: str
    how: str
    """`parsed`: by the program's own parser, or for the files that it names; `skipped`: nothing is."""
    test: str | None
    """FILE::FUNCTION; None where no test does, for the reason that `why` gives."""


NOT_RUN = (
    NotRun(
        r"tinyllama .*--publish\b", "sends to the hub", "parsed",
        "tests/tracking/test_watch.py::test_a_space_is_made_with_trackios_page_private_unless_told_otherwise",
    ),
    NotRun(
        r"tinyllama plan .*--measure\b", "times this machine", "parsed",
        "tests/plan/test_estimate.py::test_measuring_this_machine_plans_its_speed",
    ),
    # the demo's release, in all formats, is verified; the README's run is scored
    NotRun(
        r"tinyllama verify runs/(mine|demo-)", "starts every engine again", "parsed",
        "tests/release/test_verify.py::test_a_fail_is_exit_status_1_and_stands_in_the_table",
    ),
    NotRun(
        r"tinyllama evaluate runs/demo\b", "reads the tasks again", "parsed",
        "tests/evaluate/test_evaluate.py::test_the_command_scores_a_run_with_all_its_flags",
    ),
    NotRun(r"make\b", "installs from a registry, or runs all tests; what is called has its own", "parsed", None),
    NotRun(r"python benchmarks/", "takes minutes to hours; they are run by hand", "parsed", None),
    NotRun(r"python -m pytest\b", "the tests that it names run beside this one", "parsed", None),
    NotRun(
        r"(pip|uv)\b", "installs from a registry", "skipped",
        "tests/packaging/test_wheel.py::test_an_installed_wheel_plans_and_explains_itself_without_the_checkout",
    ),
    NotRun(r"pre-commit\b", "changes the checkout", "skipped", None),
    NotRun(r"hf download\b", "fetches a terabyte from the hub", "parsed", None),
    NotRun(
        r"sbatch\b", "needs a cluster", "parsed",
        "tests/cluster/test_slurm.py::test_slurm_takes_the_script_as_it_stands",
    ),
    NotRun(
        r"kubectl\b", "needs a cluster", "parsed",
        "tests/cluster/test_kubernetes.py::test_every_field_is_one_that_the_api_has",
    ),
    NotRun(r"sky\b", "needs an environment of its own: `make check-clusters` has it read the file", "parsed", None),
)  # fmt: skip
PROGRAMS = (
    "tinyllama", "torchrun", "python", "python3", "make", "pip", "uv", "pre-commit", "hf", "sbatch", "kubectl",
    "sky",
)  # fmt: skip
"""Names that a page's shell finds here instead of what is installed; all others are the system's own."""


def not_run(command: str) -> NotRun | None:
    """The reason for which a command is not carried out, if there is one."""
    return next((entry for entry in NOT_RUN if re.match(entry.pattern, command)), None)


def scaled(words: list[str]) -> list[str]:
    """The words of a `tinyllama` command for tiny data; those of a fast command as they are."""
    match words:
        case ["train", recipe, *_]:
            return [*words, *_flags(TRAINING | (PREPARING if recipe in bundled_recipes() else {}))]
        case ["prepare", recipe, *_] if recipe in (*bundled_recipes(), "continued.yaml"):
            # the model of continued.yaml must be that of its initial weights, which are tiny here
            return [*words, *_flags(TRAINING if recipe == "continued.yaml" else PREPARING)]
        case ["tokenizer", "train", *_] if "2048" not in words:  # which is a second's work
            return _with(words, "--vocab-size", "600")
        case ["evaluate", *_]:
            return _with(_with(words, "--limit", "4"), "--precision", "fp32")
        case ["generate", *_]:
            return _with(words, "--max-new-tokens", "8")
    return words


def _flags(fields: dict[str, object]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def _with(words: list[str], flag: str, value: str) -> list[str]:
    """The words with a flag's value replaced, or the flag added."""
    if flag not in words:
        return [*words, flag, value]
    place = words.index(flag)
    return [*words[: place + 1], value, *words[place + 2 :]]
