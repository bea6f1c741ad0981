"""Samples in a run's events: at each validation, the model completes the run's prompts (`train.samples`).

A killed run repeats steps when it resumes, and a run that was rolled back trains its steps on other batches. The
functions here return each sample of the current weights once. This module does not import torch.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllama.formatting import quote

Event = Mapping[str, Any]

SAMPLE_TOKENS = 32
"""Maximum length of a completion in tokens."""
SAMPLE_TEMPERATURE, SAMPLE_TOP_K, SAMPLE_SEED = 0.7, 50, 0
"""Options of the sampled completions; see `model.generation.Sampling`."""
SAMPLE_SETTINGS = (
    f"the most probable tokens, and tokens sampled at temperature {SAMPLE_TEMPERATURE:g} from the {SAMPLE_TOP_K} most "
    f"probable tokens with seed {SAMPLE_SEED}; at most {SAMPLE_TOKENS} tokens"
)
"""Description of the two completions of a prompt."""
_BLANK_LINES = re.compile(r"\n([^\S\n]*\n){2,}")
_PROMPT_CHARACTERS, _COMPLETION_CHARACTERS = 32, 48
"""Maximum number of characters of a prompt's end and of a completion's beginning on a line."""


def current_samples(events: Iterable[Event], last_step: int | None = None) -> list[Event]:
    """Return the events `sample` up to `last_step`, by default all, in the order of their steps.

    Of several samples of one step and prompt, only the newest is in the result. After a start, a rollback, or a resume
    with a changed recipe, the samples of later steps no longer belong to the run.
    """
    found: dict[tuple[int, str], Event] = {}
    for event in events:
        if not isinstance(step := event.get("step"), int):  # a damaged line, which `last_rows` does not reject
            continue
        match event.get("event"):
            case "sample":
                found[step, str(event.get("prompt", ""))] = event
            case "rollback" if isinstance(checkpoint := event.get("checkpoint"), int):
                found = _up_to(checkpoint, found)
            case "start":
                found = {}
            case "resume" if "changed" in event:
                found = _up_to(step, found)
    samples = found.values() if last_step is None else _up_to(last_step, found).values()
    return sorted(samples, key=lambda event: event["step"])


def _up_to(step: int, found: Mapping[tuple[int, str], Event]) -> dict[tuple[int, str], Event]:
    return {key: event for key, event in found.items() if key[0] <= step}


def format_sample(step: int, prompt: str, completion: str) -> str:
    """Return a sample as one short line: `step 200: "The function" → " returns a list"`."""
    completion = abbreviate_blank_lines(completion)
    if len(prompt) > _PROMPT_CHARACTERS:
        prompt = f"…{prompt[-_PROMPT_CHARACTERS:]}"
    if len(completion) > _COMPLETION_CHARACTERS:
        completion = f"{completion[:_COMPLETION_CHARACTERS]}…"
    return f"step {step:,}: {quote(prompt)} → {quote(completion)}"


def abbreviate_blank_lines(text: str) -> str:
    """Replace several blank lines by `⋮`, since early in training, many completions are blank."""
    return _BLANK_LINES.sub("\n⋮\n", text)
