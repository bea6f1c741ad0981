"""Others' weights in the formats of a release: any Hugging Face Llama, wherever it was trained.

Reads a folder or a model of the hub; writes `releases/NAME/` in the working directory, in a release's form, whose
release.json tells where the weights came from instead of how they were trained.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from tinyllama.errors import InputError, RunStoppedError, warn_once
from tinyllama.files import atomic_directory, find_escaping_symlinks, read_json, sha256_of, write_json
from tinyllama.loading import HuggingFaceLlama, load_model, load_tokenizer
from tinyllama.model.flops import num_parameters
from tinyllama.recipe.fields import NAME_PATTERN
from tinyllama.release.card_scores import by_task, eval_results
from tinyllama.release.card_use import usage_snippets
from tinyllama.release.formats import LIBRARIES, check_formats, load_formats, require_libraries, write_formats
from tinyllama.release.huggingface import CHAT_TEMPLATE, write_hugging_face
from tinyllama.release.lineage import base_model, hash_files, refuse_in_the_way
from tinyllama.release.markdown import table
from tinyllama.release.reference import compute_reference_outputs
from tinyllama.release.showing import release_progress
from tinyllama.release.verify import source_checks

GENERATION = "generation_config.json"
ALL_FORMATS = ("huggingface", "gguf", "ctranslate2")
_UNSCORED = "Not scored yet. `tinyllama evaluate releases/{}` scores it."


def release_foreign(source: str, formats: Sequence[str] = ALL_FORMATS, force: bool = False) -> Path:
    """Write `releases/NAME/` from a Hugging Face Llama's folder or hub name; return that folder.

    Raises InputError where it is no Llama, where a format's library is missing, and where the release is there already,
    unless `force` replaces it; RunStoppedError where an engine fails on a file, and, once the release is written, where
    one crashes.
    """
    there = HuggingFaceLlama.open(source)
    _refuse_links_out(there.folder)
    name = _name(Path(source)) if Path(source).exists() else source.partition("/")[2]
    folder = Path("releases") / name
    refuse_in_the_way(folder, force)
    check_formats(formats)
    require_libraries(LIBRARIES["huggingface"])  # which the source is compared in
    load_tokenizer(source).check_formats(formats)
    facts = _facts(name, source, there, formats)
    with atomic_directory(folder) as part:
        with release_progress(part, folder, facts["parameters"], formats):
            model, tokenizer = load_model(source), load_tokenizer(source)
            write_hugging_face(part / "huggingface", model, tokenizer)
            _copy_chat_template(there.folder, part / "huggingface", there.vocab_size)
            facts["reference"] = compute_reference_outputs(model, tokenizer)
            del model
            _compare_with_transformers(there.folder, facts["reference"])
            write_formats(part, formats, name)
            crash = load_formats(part, facts["reference"], in_transformers=True)
        (part / "huggingface" / "README.md").write_text(foreign_card(facts, None), encoding="utf-8")
        write_json(part / "release.json", {**facts, "files": hash_files(part)})
    if crash:
        raise RunStoppedError(f"{folder}: released, but {crash}")
    return folder


def _refuse_links_out(source: Path) -> None:
    """Raise InputError where a file is a link out of its folder: its bytes could become part of the release.

    Links of the hub's cache lead to `blobs`, next to the folder of its snapshots.
    """
    blobs = source.resolve().parent.parent / "blobs"
    for path in find_escaping_symlinks(source):
        if path.resolve().parent != blobs:
            raise InputError(f"{path}: is a link to {path.resolve()}, outside its folder; put the file itself there")


def _compare_with_transformers(source: Path, reference: dict[str, Any]) -> None:
    """Raise InputError where transformers computes something else from the source than the reference says.

    Raises RunStoppedError where transformers crashed, which is no evidence against the source.
    """
    failed = next((check for check in source_checks(source, reference) if not check.passed), None)
    if failed is None:
        return
    if failed.remedy:
        raise RunStoppedError(f"{source}: not compared with transformers: {failed.found}; {failed.remedy}")
    if failed.what == "loads and runs":
        raise InputError(
            f"{source}: transformers does not run it ({failed.found}); make it load there, then release it"
        )
    raise InputError(
        f"{source}: transformers disagrees with what is read here ({failed.what}: {failed.found} instead of "
        f"{failed.expected}), so nothing is released; please report it with the folder's config.json"
    )


def _copy_chat_template(source: Path, folder: Path, num_rows: int) -> None:
    """Take over a chat model's template, where transformers 5 looks for it, and how it ends what it says."""
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    if (source / CHAT_TEMPLATE).is_file():
        shutil.copyfile(source / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    elif isinstance(settings.get("chat_template"), str):
        (folder / CHAT_TEMPLATE).write_text(settings["chat_template"], encoding="utf-8")
    if (source / GENERATION).is_file():
        _take_over_generation(source / GENERATION, folder / GENERATION, num_rows)


def _take_over_generation(source: Path, path: Path, num_rows: int) -> None:
    """Add the settings of a generation_config.json to those that are there, but for ids beyond the weights' rows."""
    taken = {}
    for name, value in read_json(source).items():
        ids = value if isinstance(value, list) else [value]
        beyond = [number for number in ids if isinstance(number, int) and number >= num_rows]
        if name.endswith("_token_id") and beyond:
            warn_once(f"{source}: {name} {value} is beyond the weights' {num_rows} rows; ignored")
            ids = [number for number in ids if number not in beyond]
        if ids not in ([], [None]):
            taken[name] = ids if isinstance(value, list) else value
    write_json(path, read_json(path) | taken)


def _name(source: Path) -> str:
    """A folder's name; a release's, and its Hugging Face folder's, is the released model's."""
    for folder in (source, source.resolve().parent):
        path = folder / "release.json"
        if path.is_file():
            facts = read_json(path)
            name = facts.get("name") if isinstance(facts, dict) else None
            if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
                raise InputError(f"{path}: name {str(name)[:40]!r} is no name of a model; correct it")
            return name
    return source.resolve().name


def _facts(name: str, source: str, there: HuggingFaceLlama, formats: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "step": None,
        "tokens": None,
        "parameters": num_parameters(there.config, there.vocab_size),
        "initial_weights": {
            "source": source,
            "digest": there.digest,
            "config": sha256_of(there.folder / "config.json"),
            "vocab_size": there.vocab_size,
        },
        "formats": list(formats),
        "versions": {"tinyllama": version("tinyllama"), "torch": torch.__version__},
    }


def foreign_card(facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    """The card of weights that were trained elsewhere, from the contents of release.json and evaluation.json."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=facts["name"],
        base_model=base_model(facts),
        eval_results=eval_results(evaluation) if evaluation else None,
    )
    origin, versions = facts["initial_weights"], facts["versions"]
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "weights": f"{origin['source']}, in bf16; their files' SHA-256 `{origin['digest']}`",
        "converted with": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    scores = by_task(evaluation) if evaluation else _UNSCORED.format(facts["name"])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {facts['name']}\n\n"
        f"A Llama that was trained elsewhere, in the formats of a release.\n\n{table(('', ''), rows.items())}\n\n"
        f"## Scores\n\n{scores}\n\n## How to use it\n\n{usage_snippets(facts['name'], facts['formats'])}\n"
    )
