"""Model cards: README.md of a release with metadata for the hub, rendered from card.md.jinja.

A card depends only on release.json, evaluation.json and releases.json, so the card can be written again after a new
evaluation. Published scores are marked as such. Measured scores always have a standard error and the number of items.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tinyllama.errors import InputError
from tinyllama.evaluate.results import HELLASWAG_CHANCE, SCORE_COLUMNS, describe_measurement, score_rows
from tinyllama.files import atomic_write, blocking_lock, read_json, reject_symlink, reject_symlinks, write_json
from tinyllama.formatting import format_count, format_duration_precise, format_score, quote, visible
from tinyllama.hardware import format_hardware
from tinyllama.plots.charts import draw_scores, save_png
from tinyllama.recipe import Recipe
from tinyllama.release.metadata import (
    EMBEDDED_CORPUS,
    PUBLIC_DATASETS,
    base_model,
    has_scores,
    hash_file,
    release_score,
    releases_table,
)
from tinyllama.runs.run_dir import ReleaseDir, ReleasesDir

Json = Mapping[str, Any]

DATA_COLUMNS = ("source", "what it is", "weight", "split", "documents", "tokens", "manifest (SHA-256)")
"""Column names of `data_rows`."""
RELEASE_COLUMNS = ("model", "date", "tokens", "HellaSwag acc_norm", "mean of 7 tasks", "source")
"""Column names of `release_rows`."""
_CARD, _SCORE_PLOT = "huggingface/README.md", "huggingface/scores.png"
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the blocks' matrices, AdamW for the rest"}
_LANGUAGES = {"slimpajama": "en", "starcoderdata": "code"}
# For each task of lm-eval: the name of its data set on the hub, and the split that lm-eval scores.
_TASK_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "openbookqa": ("allenai/openbookqa", "test"),
    "winogrande": ("allenai/winogrande", "validation"),
    "arc_challenge": ("allenai/ai2_arc", "test"),
    "arc_easy": ("allenai/ai2_arc", "test"),
    "boolq": ("google/boolq", "validation"),
    "piqa": ("ybisk/piqa", "validation"),
    "lambada_openai": ("EleutherAI/lambada_openai", "test"),
}


def update_card(folder: str | Path) -> Path:
    """Write a release's card with the scores in its evaluation.json; return the card's path.

    The release's row in releases.json, which the cards of all releases of the run show, is updated too. In
    release.json, only the hashes of the written files change, so damage to other files stays detectable. Raises
    InputError if the folder is not a release, or if the step of the scores differs from that of the release.
    """
    release = ReleaseDir(Path(folder))
    reject_symlink(release.path.parent)
    step = release.metadata()["step"]
    if release.evaluation_path.is_file() and (found := read_json(release.evaluation_path)["step"]) != step:
        raise InputError(
            f"{release.evaluation_path}: scores of step {found}, but the release is of step {step}; evaluate {folder}"
        )
    if step is None:  # external weights, not part of a run
        write_card(release, None)
    else:
        update_cards(ReleasesDir(release.path.resolve().parent))
    return release.path / _CARD


def update_cards(releases: ReleasesDir) -> None:
    """Rewrite releases.json and the card of every release of a run."""
    reject_symlink(releases.path)
    with blocking_lock(releases.cards_lock_path):  # two processes may update the cards at the same time
        table = releases_table(releases)
        write_json(releases.table_path, table)
        for row in table["releases"]:
            write_card(releases.release(row["folder"]), table)


def write_card(release: ReleaseDir, table: Json | None) -> None:
    """Write a release's card and its plot of scores; update the hashes of the written files in release.json.

    `table` is the content of releases.json, or None for a release of external weights.
    """
    reject_symlink(release.path)
    reject_symlinks(release.path)
    metadata, card = read_json(release.metadata_path), release.path / _CARD
    with atomic_write(card) as file:
        file.write(render_card(metadata, release.evaluation(), table).encode())
    if table and has_scores(table):
        draw = partial(draw_scores, releases=table, chance=HELLASWAG_CHANCE)
        save_png(draw, release.path / _SCORE_PLOT, "HellaSwag acc_norm (per cent)")
    written = [path for path in (card, release.path / _SCORE_PLOT, release.evaluation_path) if path.is_file()]
    metadata["files"] |= {path.relative_to(release.path).as_posix(): hash_file(path) for path in written}
    write_json(release.metadata_path, metadata)


def render_card(metadata: Json, evaluation: Json | None, table: Json | None) -> str:
    """Render the card in Markdown with YAML metadata.

    The parameters are the contents of release.json, evaluation.json (None if the release was not evaluated) and
    releases.json (None for a release of external weights).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown; the template escapes external text with `cell`
    )
    environment.filters |= {"cell": _escape_cell, "count": format_count, "hardware": format_hardware, "quote": quote}
    environment.filters |= {"duration": format_duration_precise, "spec": format, "visible": visible}
    context: dict[str, Any] = {
        "card_data": _card_data(metadata, evaluation).to_yaml(),
        "m": metadata,
        "recipe": None,
        "versions": ", ".join(f"{name} {number}" for name, number in metadata["versions"].items()),
        "evaluation": evaluation,
        "score_columns": SCORE_COLUMNS,
        "release_rows": [],
    }
    if evaluation:
        context |= {"measurement": describe_measurement(evaluation), "score_rows": list(score_rows(evaluation))}
    if table is not None:
        context |= _run_context(metadata, table)
    return environment.get_template("card.md.jinja").render(context)


def _run_context(metadata: Json, table: Json) -> dict[str, Any]:
    """Return the template variables that are defined only for a release of a run."""
    recipe, sources = Recipe.model_validate(metadata["recipe"]["fields"]), metadata["store"]["sources"]
    rows = [
        tuple(f"**{cell}**" if row.get("step") == metadata["step"] and cell else cell for cell in cells)
        for row, cells in release_rows(table)
    ]
    return {
        "recipe": recipe,
        "optimizer_name": _OPTIMIZERS[recipe.train.optimizer.name],
        "is_embedded_corpus": EMBEDDED_CORPUS in {source["origin"] for source in sources.values()},
        "data_columns": DATA_COLUMNS,
        "data_rows": [
            (name, _link_dataset(description), *cells, f"`{digest[:16]}`")
            for name, description, *cells, digest in data_rows(sources, recipe)
        ],
        "mixture_stages": describe_mixture_stages(recipe),
        "release_columns": RELEASE_COLUMNS,
        "release_rows": rows if has_scores(table) else [],
    }


def _card_data(metadata: Json, evaluation: Json | None) -> ModelCardData:
    """Return the metadata that the hub reads from the card of a release."""
    fields: dict[str, Any] = {}
    if metadata["step"] is not None:
        recipe = Recipe.model_validate(metadata["recipe"]["fields"])
        origins = {name: source["origin"] for name, source in metadata["store"]["sources"].items()}
        formats = {source.format for name, source in recipe.data.sources.items() if origins[name]}
        languages = {_LANGUAGES[name] for name in formats if name in _LANGUAGES}
        fields = {
            "license": metadata.get("license"),
            "language": sorted(languages, reverse=True) or None,  # en before code
            "datasets": sorted(set(origins.values()) & set(PUBLIC_DATASETS.values())) or None,
        }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tinyllama", "llama", *(name for name in metadata["formats"] if name != "huggingface")],
        base_model=base_model(metadata),
        model_name=metadata["name"],
        eval_results=list(_eval_results(evaluation)) if evaluation else None,
        **fields,
    )


def _eval_results(evaluation: Json) -> Iterator[EvalResult]:
    """Yield the scores in the hub's format (model-index), in per cent."""
    for task, row in evaluation["rows"].items():
        dataset, split = _TASK_DATASETS.get(task, (task, None))
        for metric in (name for name in ("acc", "acc_norm") if name in row):
            stderr = row.get(f"{metric}_stderr")
            arguments: dict[str, Any] = {} if stderr is None else {"stderr": round(100 * stderr, 2)}
            yield EvalResult(
                task_type="text-generation",
                dataset_name=f"{task} ({evaluation['coverage'][task]})",
                dataset_type=dataset,
                dataset_split=split,
                metric_type=metric,
                metric_value=round(100 * row[metric], 2),
                metric_args=arguments | {"num_fewshot": evaluation.get("num_fewshot", {}).get(task) or 0},
            )


def data_rows(sources: Json, recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Yield the cells of DATA_COLUMNS per source and split; `sources` is the field `sources` from `summarize_store`."""
    fractions = _fractions({name: source.weight for name, source in recipe.data.sources.items()})
    for name, source in recipe.data.sources.items():
        summary = sources.get(name, {"origin": None, "splits": {}})
        description = summary["origin"] or f"own files ({source.format})"
        if source.exclude:
            description += f" without {', '.join(source.exclude)}"
        for split, part in summary["splits"].items():
            counts = (f"{part['documents']:,}", f"{part['tokens']:,}")
            yield name, description, f"{fractions[name]:.1%}", split, *counts, part["manifest_sha256"]


def describe_mixture_stages(recipe: Recipe) -> list[str]:
    """Return one line of text for each stage of the recipe's mixture schedule."""
    sentences = []
    for stage in recipe.data.stages:
        ramp = f", reached over {stage.ramp_tokens:,} tokens" if stage.ramp_tokens else ""
        weights = ", ".join(f"{name} {fraction:.1%}" for name, fraction in _fractions(stage.weights).items())
        sentences.append(f"From {stage.from_tokens:,} tokens on{ramp}: {weights}")
    return sentences


def _fractions(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def release_rows(table: Json) -> Iterator[tuple[Json, tuple[str, ...]]]:
    """Yield each row of releases.json with the cells of RELEASE_COLUMNS."""
    for row in (*table["releases"], *table["baselines"]):
        name, date = (f"{row['name']}, step {row['step']:,}", row["date"]) if "step" in row else (row["name"], "")
        score, source = release_score(row), row["source"] or ""
        if source == "measured" and row["coverage"]:
            source += f", {row['coverage']}"
        tokens = "" if row["tokens"] is None else format_count(row["tokens"])
        mean = "" if row["mean_of_seven"] is None else format_score(row["mean_of_seven"])
        yield row, (name, date, tokens, "" if score is None else str(score), mean, source)


def _escape_cell(text: str) -> str:
    """Escape control characters, `<` outside code, `|` and newlines in the text of a table cell."""
    escaped = re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", visible(text))
    return escaped.replace("|", "\\|").replace("\n", " ")


def _link_dataset(description: str) -> str:
    """If a description begins with the name of a public data set, replace the name with a link to the data set."""
    name = next((name for name in PUBLIC_DATASETS.values() if description.startswith(name)), None)
    return f"[{name}](https://huggingface.co/datasets/{name}){description.removeprefix(name)}" if name else description
