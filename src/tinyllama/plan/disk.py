"""What lies on disk: the token store, the checkpoints, the releases."""

from collections.abc import Iterable
from pathlib import Path

from tinyllama.errors import InputError
from tinyllama.files import disk_usage_bytes
from tinyllama.prepare.endings import PACKINGS
from tinyllama.prepare.sources import InputFile, list_files
from tinyllama.recipe import Recipe
from tinyllama.recipe.data_schema import SLIMPAJAMA_SUBSETS, Source

# Tokens of the two data sets by Llama 2's tokenizer. The original TinyLlama's tokenised data took 1.8 TB at two bytes
# a token and was mixed by 0.693584 to 0.306416 (TinyLlama, README and pretrain/tinyllama.py), the shares of the two.
_PUBLISHED_TOKENS = {"slimpajama": 0.693584 * 900e9, "starcoderdata": 0.306416 * 900e9}
# Of SlimPajama's bytes (cerebras/SlimPajama-627B, data set card); the tokens above are those without GitHub.
_SUBSET_SHARES = {
    "RedPajamaCommonCrawl": 0.522, "RedPajamaC4": 0.267, "RedPajamaGithub": 0.052, "RedPajamaBook": 0.042,
    "RedPajamaArXiv": 0.046, "RedPajamaWikipedia": 0.038, "RedPajamaStackExchange": 0.033,
}  # fmt: skip
assert set(_SUBSET_SHARES) == set(SLIMPAJAMA_SUBSETS)

_BYTES_PER_TOKEN = 4.0
_PACKED, _UNPACKED = {*PACKINGS, ".parquet"}, 3.0

# Bytes a parameter: gguf's block sizes (Q8_0: 34 bytes for 32), Q4_K_M as measured at 1.1B (benchmarks/release_1b.py).
FORMAT_BYTES = {"huggingface": 2.0, "gguf": 2.0 + 34 / 32 + 0.607, "ctranslate2": 1.0 + 4.0}


def store_size(recipe: Recipe, vocab_size: int) -> tuple[int, str]:
    """Bytes of the token store, and how they are known: of its files, or of what each source seems to hold.

    A source of which nothing is known counts with the tokens that the run takes from it, each once.
    """
    manifest = Path(recipe.data.store) / "manifest.json"
    if manifest.is_file():
        return disk_usage_bytes(manifest.parent), "its files"
    total = sum(source.weight for source in recipe.data.sources.values())
    found = {name: _tokens_of(recipe, name, source) for name, source in recipe.data.sources.items()}
    reads = {
        name: (recipe.train.tokens * recipe.data.sources[name].weight / total, "what the run reads") for name in found
    }
    sizes = [known or reads[name] for name, known in found.items()]
    how = " and ".join(sorted({words for _, words in sizes}))
    return round(sum(tokens for tokens, _ in sizes) * (2 if vocab_size <= 1 << 16 else 4)), how


def _tokens_of(recipe: Recipe, name: str, source: Source) -> tuple[float, str] | None:
    """Tokens that a source holds, and how that is known."""
    try:
        raw = 0.0 if "://" in source.path else sum(map(_text_bytes, list_files(name, source)))
    except InputError:  # not here yet
        raw = 0.0
    if raw:
        return raw / _BYTES_PER_TOKEN, "the raw files' sizes, 4 bytes a token"
    published = _published_tokens(source)
    if published is None or _is_embedded_corpus(recipe):
        return None
    return published, "the data sets' published sizes"


def _text_bytes(file: InputFile) -> float:
    """Bytes of text in a file: of a packed one, three times its own, as is usual for text."""
    return file.size * (_UNPACKED if Path(file.path).suffix.lower() in _PACKED else 1)


def _is_embedded_corpus(recipe: Recipe) -> bool:
    """Whether the sources are the folders that `tinyllama corpus` writes, which are small."""
    sources = recipe.data.sources.items()
    parents = {Path(source.path).parent for _, source in sources}
    return len(parents) == 1 and all(Path(source.path).name == name == source.format for name, source in sources)


def _published_tokens(source: Source) -> float | None:
    if source.format == "starcoderdata":
        return _PUBLISHED_TOKENS["starcoderdata"]
    if source.format != "slimpajama":
        return None
    without_github = 1 - _SUBSET_SHARES["RedPajamaGithub"]
    kept = 1 - sum(_SUBSET_SHARES[name] for name in source.exclude)
    return _PUBLISHED_TOKENS["slimpajama"] * kept / without_github


def checkpoints_bytes(recipe: Recipe, one: int) -> int:
    """All that are kept, the milestones', and the one being written."""
    return one * (min(recipe.checkpoint.keep, recipe.train.steps) + len(recipe.milestone_steps()) + 1)


def release_bytes(formats: Iterable[str], parameters: int) -> int:
    """One release in these formats."""
    return round(parameters * sum(FORMAT_BYTES[name] for name in {"huggingface", *formats}))
