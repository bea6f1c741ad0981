"""Disk space of the token store, the checkpoints and the releases."""

from pathlib import Path

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import disk_usage_bytes
from tinyllama.prepare.sources import COMPRESSIONS, list_files
from tinyllama.recipe import Recipe, Source

# Number of tokens of the two data sets with Llama 2's tokenizer. TinyLlama's tokenised data took 1.8 TB at two bytes
# per token. Its mixture weights were 0.693584 and 0.306416 (TinyLlama, README and pretrain/tinyllama.py).
_PUBLISHED_TOKENS = {"slimpajama": 0.693584 * 900e9, "starcoderdata": 0.306416 * 900e9}
# Fractions of SlimPajama's bytes (cerebras/SlimPajama-627B, data set card). The tokens above exclude GitHub.
_SUBSET_FRACTIONS = {
    "RedPajamaCommonCrawl": 0.522, "RedPajamaC4": 0.267, "RedPajamaGithub": 0.052, "RedPajamaBook": 0.042,
    "RedPajamaArXiv": 0.046, "RedPajamaWikipedia": 0.038, "RedPajamaStackExchange": 0.033,
}  # fmt: skip

_TEXT_BYTES_PER_TOKEN = 4.0
_COMPRESSED_SUFFIXES, _COMPRESSION_RATIO = {*COMPRESSIONS, ".parquet"}, 3.0


def store_size(recipe: Recipe, vocab_size: int) -> tuple[int, str]:
    """Return the size of the token store in bytes, and a description of how the size was determined.

    A complete store is measured. Otherwise, the size is estimated per source. For a source of unknown size, the
    estimate is the number of tokens that the run reads from this source.
    """
    store = Path(recipe.data.store)
    if TokenStore.exists(store):
        return disk_usage_bytes(store), "its files"
    sources = recipe.data.sources
    total_weight = sum(source.weight for source in sources.values())
    parents = {Path(source.path).parent for source in sources.values()}
    is_embedded_corpus = len(parents) == 1 and all(
        Path(source.path).name == name == source.format for name, source in sources.items()
    )
    tokens, bases = 0.0, set()
    for name, source in sources.items():
        published = None if is_embedded_corpus else _published_tokens(source)
        if raw := _raw_text_bytes(name, source):
            tokens += raw / _TEXT_BYTES_PER_TOKEN
            bases.add("the raw files' sizes, 4 bytes per token")
        elif published is not None:
            tokens += published
            bases.add("the data sets' published sizes")
        else:
            tokens += recipe.train.tokens * source.weight / total_weight
            bases.add("what the run reads")
    return round(tokens * (2 if vocab_size <= 1 << 16 else 4)), " and ".join(sorted(bases))


def _raw_text_bytes(name: str, source: Source) -> float:
    """Return the bytes of text in a source's local files, estimated for compressed files; 0 without files."""
    try:
        files = [] if "://" in source.path else list_files(name, source)
    except InputError:  # not downloaded yet
        return 0.0
    is_compressed = [Path(file.path).suffix.lower() in _COMPRESSED_SUFFIXES for file in files]
    ratios = [_COMPRESSION_RATIO if compressed else 1.0 for compressed in is_compressed]
    return sum(file.size * ratio for file, ratio in zip(files, ratios, strict=True))


def _published_tokens(source: Source) -> float | None:
    if source.format != "slimpajama":
        return _PUBLISHED_TOKENS.get(source.format)
    kept = 1 - sum(_SUBSET_FRACTIONS[name] for name in source.exclude)
    return _PUBLISHED_TOKENS["slimpajama"] * kept / (1 - _SUBSET_FRACTIONS["RedPajamaGithub"])


def checkpoints_bytes(recipe: Recipe, checkpoint_bytes: int) -> int:
    """Return the bytes of all checkpoints: kept checkpoints, milestones, and the checkpoint being written."""
    return checkpoint_bytes * (min(recipe.checkpoint.keep, recipe.train.steps) + len(recipe.milestone_steps()) + 1)
