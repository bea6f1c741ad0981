"""A card's data: what the run read, in which shares, and what its documents look like.

From a recipe and what the store's manifest says of its sources; a report tells the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tinyllama.recipe import MixtureStage, Recipe, Source
from tinyllama.release.lineage import PUBLIC
from tinyllama.release.markdown import table

Facts = Mapping[str, Any]

DATA_HEAD = ("source", "what it is", "weight", "split", "documents", "tokens", "manifest (SHA-256)")


def data_section(sources: Facts, recipe: Recipe) -> str:
    """The table, the mix's later stages and the form of a document, in Markdown."""
    rows = [
        (name, _linked(what), weight, split, documents, tokens, f"`{digest[:16]}`")
        for name, what, weight, split, documents, tokens, digest in data_rows(sources, recipe)
    ]
    markers = recipe.data.document
    document = f"{'`<s>` ' * markers.bos}text{' `</s>`' * markers.eos}"
    return "\n\n".join([table(DATA_HEAD, rows), *mix_stages(recipe), f"A document is {document}; nothing is padded."])


def data_rows(sources: Facts, recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """DATA_HEAD's cells of each source and split that the store has; `sources` is `store_facts`'."""
    shares = _shares({name: source.weight for name, source in recipe.data.sources.items()})
    for name, source in recipe.data.sources.items():
        found = sources.get(name, {"origin": None, "splits": {}})
        for split, part in found["splits"].items():
            counts = (f"{part['documents']:,}", f"{part['tokens']:,}")
            yield (
                name,
                _source_label(source, found["origin"]),
                f"{shares[name]:.1%}",
                split,
                *counts,
                part["manifest_sha256"],
            )


def mix_stages(recipe: Recipe) -> list[str]:
    """A sentence for each later mix of the recipe."""
    return [
        f"From {stage.from_tokens:,} tokens on{_over(stage)}: "
        + ", ".join(f"{name} {share:.1%}" for name, share in _shares(stage.weights).items())
        for stage in recipe.data.stages
    ]


def _over(stage: MixtureStage) -> str:
    return f", reached over {stage.ramp_tokens:,} tokens" if stage.ramp_tokens else ""


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _source_label(source: Source, origin: str | None) -> str:
    left_out = f" without {', '.join(source.exclude)}" if source.exclude else ""
    return f"{origin or f'files of its maker ({source.format})'}{left_out}"


def _linked(what: str) -> str:
    """With a public data set's name as a link to it."""
    name = next((name for name in PUBLIC.values() if what.startswith(name)), None)
    return f"[{name}](https://huggingface.co/datasets/{name}){what.removeprefix(name)}" if name else what
