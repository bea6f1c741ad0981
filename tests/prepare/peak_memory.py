"""Programs whose last word of output is their peak memory in kilobytes.

python peak_memory.py read PATH FORMAT [SEPARATOR]    prints rows, characters and the peak
python peak_memory.py prepare RECIPE OVERRIDES        prints the tokens of books/train and the peak
"""

import json
import sys
from pathlib import Path

from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.readers import SourceRow, read_rows
from tinyllama.recipe import Recipe, Source


def read(path: str, format: str, separator: str | None = None) -> tuple[int, int]:
    chosen = {"format": format, "path": path, "weight": 1, "separator": separator, "max_compression_ratio": 10**6}
    num_rows = characters = 0
    for row in read_rows(path, Source.model_validate(chosen)):
        assert isinstance(row, SourceRow), row
        num_rows += 1
        characters += len(row.text)
    return num_rows, characters


def prepare(recipe: str, overrides: str) -> tuple[int]:
    store = build_store(Recipe.load(recipe, json.loads(overrides)))
    assert store is not None
    return (store["books/train"].num_tokens,)


program, *arguments = sys.argv[1:]
counts = read(*arguments) if program == "read" else prepare(*arguments)
# Linux records the peak of this process; getrusage would report the parent's if that was higher.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(*counts, peak.split()[1])
