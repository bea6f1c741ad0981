"""Cleaning of English text by tinyllama or datatrove on one core, for benchmarks/cleaning.py.

The program runs with the arguments `PROGRAM FILES MEGABYTES`, in an environment that has PROGRAM. It prints JSON: the
bytes of the text, and for each step the CPU time in seconds and the number of kept documents. Each step reads all
documents; the last step is a chain of all steps, which stops at the first filter that drops a document.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document
from deduplication_peers import read

FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
CHAIN = "all steps"
Step = Callable[[Document], bool]

# ruff: noqa: PLC0415 - each program is imported only where it runs


def main() -> None:
    """Print the measurements as JSON."""
    program, files, megabytes = sys.argv[1:]
    texts = read(Path(files), float(megabytes) * 1e6)
    steps = {"tinyllama": tinyllama_steps, "datatrove": datatrove_steps}[program]()
    found = {}
    for name in [*steps, CHAIN]:
        own = list(steps.values()) if name == CHAIN else [steps[name]]
        count(own, texts[:2])  # loads models
        begun = time.process_time()
        kept = count(own, texts[2:])
        found[name] = {"seconds": time.process_time() - begun, "kept": kept}
    print(json.dumps({"bytes": sum(len(text.encode()) for text in texts[2:]), "steps": found}))


def count(steps: list[Step], texts: list[str]) -> int:
    """Return the number of documents that all steps keep."""
    documents = (Document(text, "") for text in texts)
    return sum(all(step(document) for step in steps) for document in documents)


def tinyllama_steps() -> dict[str, Step]:
    """Return the steps of the preset `web` that read text, without the search for duplicates."""
    from tinyllama.prepare.languages import language_reason
    from tinyllama.prepare.personal_data import MASKS
    from tinyllama.prepare.quality import quality_check
    from tinyllama.recipe import Cleaning

    cleaning = Cleaning.model_validate("web")

    def identify(document: Document) -> bool:
        return language_reason(document.text, cleaning.languages, cleaning.min_language_probability) is None

    def passes(name: str) -> Step:
        check = quality_check(name, cleaning)
        return lambda document: check(document) is None

    def mask(document: Document) -> bool:
        for replace in MASKS.values():
            document.text = replace(document.text)
        return True

    return {"languages": identify, **{name: passes(name) for name in FILTERS}, "masking": mask}


def datatrove_steps() -> dict[str, Step]:
    """Return the same steps of datatrove, whose words come from spaCy; its language model is a download."""
    from datatrove.pipeline import filters
    from datatrove.pipeline.formatters import PIIFormatter

    own = {
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "gopher_quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb": filters.FineWebQualityFilter(),
    }
    formatter = PIIFormatter()

    def passes(name: str) -> Step:
        return lambda document: own[name].filter(document) is True

    def mask(document: Document) -> bool:
        document.text = formatter.format(document.text)
        return True

    return {**{name: passes(name) for name in FILTERS}, "masking": mask}


if __name__ == "__main__":
    main()
