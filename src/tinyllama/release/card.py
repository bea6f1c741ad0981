"""The model card: a README.md that the hub, and a stranger, can read.

A pure function of release.json and evaluation.json, so no figure in it is typed and it can be written again
when scores have come. Published scores are marked as such; the model's own never stand without their error.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from tinyllama.formatting import format_count
from tinyllama.hardware import format_hardware
from tinyllama.recipe import Recipe, Schedule
from tinyllama.release.card_data import data_section
from tinyllama.release.card_scores import eval_results, scores_section
from tinyllama.release.card_use import usage_snippets
from tinyllama.release.lineage import EMBEDDED, PUBLIC, base_model
from tinyllama.release.markdown import table

Facts = Mapping[str, Any]

_OPTIMISERS = {"adamw": "AdamW", "muon": "Muon for the blocks' matrices, AdamW for the rest"}
_LANGUAGES = {"slimpajama": "en", "starcoderdata": "code"}


def model_card(facts: Facts, evaluation: Facts | None, releases: Facts) -> str:
    """The card in Markdown, YAML metadata first.

    From the contents of release.json, evaluation.json and releases.json (see `releases_table`).
    """
    recipe = Recipe.model_validate(facts["recipe"]["fields"])
    sections = {
        "Training": _training(facts, recipe),
        "Data": data_section(facts["store"]["sources"], recipe),
        "Scores": scores_section(facts, evaluation, releases),
        "Loss": _loss(facts),
        "How to use it": usage_snippets(facts["name"], facts["formats"]),
        "Limits": _limits(facts, recipe),
        "Lineage": _lineage(facts),
    }
    body = "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())
    return f"---\n{_metadata(facts, recipe, evaluation)}\n---\n\n{_what_it_is(facts)}\n\n{body}"


def _metadata(facts: Facts, recipe: Recipe, evaluation: Facts | None) -> str:
    origins = {name: source["origin"] for name, source in facts["store"]["sources"].items()}
    known = [source.format for name, source in recipe.data.sources.items() if origins[name]]
    languages = {_LANGUAGES[form] for form in known if form in _LANGUAGES}
    data = ModelCardData(
        license=recipe.release.license,
        language=sorted(languages, reverse=True) or None,  # en before code
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=sorted(set(origins.values()) & set(PUBLIC.values())) or None,
        base_model=base_model(facts),
        model_name=facts["name"],
        eval_results=eval_results(evaluation) if evaluation else None,
    )
    return data.to_yaml()


def _what_it_is(facts: Facts) -> str:
    return (
        f"# {facts['name']}, step {facts['step']:,}\n\n"
        f"A Llama of {facts['parameters']:,} parameters, pretrained on {facts['tokens']:,} tokens. "
        "Its architecture is that of Llama 2: what loads the one loads the other. It is a base model: it "
        f"goes on with a text and was not taught to follow instructions.{_data_note(facts)}"
    )


def _data_note(facts: Facts) -> str:
    if EMBEDDED not in {source["origin"] for source in facts["store"]["sources"].values()}:
        return ""
    return (
        "\n\nIt was trained on the embedded corpus of tinyllama: text and code of the Python packages that "
        "were installed on the machine, in the form of SlimPajama and Starcoderdata but none of their text."
    )


def _training(facts: Facts, recipe: Recipe) -> str:
    shape, train = recipe.model, recipe.train
    optimizer = train.optimizer
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "layers, width, feed-forward width": f"{shape.layers}, {shape.dim}, {shape.ffn_dim}",
        "heads, key/value heads": f"{shape.heads}, {shape.kv_heads}",
        "vocabulary": f"{facts['tokenizer']['vocab_size']:,}",
        "embeddings": "tied" if shape.tie_embeddings else "not tied",
        "context": f"{shape.context_length:,} tokens",
        "tokens seen": f"{facts['tokens']:,} of {train.steps * train.batch_tokens:,} planned",
        "tokens per parameter": f"{facts['tokens'] / facts['parameters']:.2f}",
        "steps": f"{facts['step']:,} of {train.steps:,}",
        "batch": f"{train.batch_tokens:,} tokens ({train.batch_sequences:,} sequences)",
        "sequence length": f"{train.sequence_length:,} tokens",
        "optimiser": f"{_OPTIMISERS[optimizer.name]}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
        f"weight decay {optimizer.weight_decay:g}, gradient norm clipped at {optimizer.max_gradient_norm:g}",
        "learning rate": f"{optimizer.learning_rate:g} at its peak, {_schedule(train.schedule)}",
        "precision": "bf16 computation, float32 weights" if train.precision == "bf16" else "float32",
        "seed": str(recipe.seed),
        "recipe digest": f"`{facts['recipe']['digest']}`",
    }
    if used := facts.get("hardware"):  # releases of earlier versions have none
        rows["hardware"] = "; then ".join(map(format_hardware, used))
    return table(("", ""), rows.items())


def _schedule(schedule: Schedule) -> str:
    warmup = f"{schedule.warmup_steps:,} steps of warm-up"
    if schedule.name == "cosine":
        return f"{warmup}, then a cosine to {schedule.final_learning_rate:g}"
    decay = f"the last {schedule.decay_fraction:.0%} of all steps down to {schedule.final_learning_rate:g}"
    return f"{warmup}, then constant, then {decay}"


def _loss(facts: Facts) -> str:
    measured = facts["measured"]
    of = "" if len(facts["checkpoints"]) == 1 else ", of the newest of the checkpoints and not of their mean"
    lines = ["![Training and validation loss against tokens seen](loss.png)"]
    if "validation_step" in measured:
        lines.append(
            f"Validation at step {measured['validation_step']:,}: "
            f"**{measured['validation_bits_per_byte']:.4f} bits per byte**, "
            f"a loss of {measured['validation_loss']:.4f} nats per token{of}."
        )
    return "\n\n".join([*lines, f"Training loss of the last step: {measured['loss']:.4f} nats per token."])


def _limits(facts: Facts, recipe: Recipe) -> str:
    return "\n".join(
        [
            f"- It reads at most {recipe.model.context_length:,} tokens at once.",
            "- It repeats what its data says, false and hurtful things included; nothing prevents that.",
            "- It was not tuned to follow instructions or to hold a conversation.",
            f"- {format_count(facts['parameters'])} parameters and {format_count(facts['tokens'])} tokens hold "
            "few facts; do not rely on what it states.",
        ]
    )


def _lineage(facts: Facts) -> str:
    inputs, versions = facts["store"]["inputs"], facts["versions"]
    rows = {
        "raw files": f"{inputs['files']:,}, {inputs['bytes']:,} bytes",
        "token store, its manifest": f"`{facts['store']['manifest_sha256']}`",
        "tokenizer": f"`{facts['tokenizer']['digest']}`",
        "recipe": f"`{facts['recipe']['digest']}`",
        "initial weights": _initial_weights_text(facts["initial_weights"]),
        "skipped batches": ", ".join(map(str, facts["skipped_batches"])) or "none",
        "weights": _weights(facts),
        "exported with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    found = table(("from raw file to weights", "SHA-256, or what it is"), rows.items())
    return f"{found}\n\n`release.json`, beside the formats, holds the recipe and the SHA-256 of every file."


def _initial_weights_text(initial: Facts | None) -> str:
    return f"{initial['source']} `{initial['digest']}`" if initial else "drawn from the seed"


def _weights(facts: Facts) -> str:
    """The checkpoint, or those that were averaged."""
    commits = [f"{name} `{commit}`" for name, commit in facts["checkpoints"].items()]
    if len(commits) == 1:
        return f"the checkpoint {commits[0]}"
    return f"the mean of {', '.join(commits)}, each weighing {facts['average_decay']:g} times the one after it"
