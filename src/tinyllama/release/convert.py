"""Releases of external weights: any Hugging Face Llama, exported in the formats of a release.

The source is a folder or a model of the hub. The release is written to `releases/NAME/` in the working directory. Its
release.json records the source of the weights instead of a training run.
"""

import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tinyllama.errors import InputError, RunStoppedError, warn_once
from tinyllama.files import atomic_directory, find_escaping_symlinks, read_json, sha256_of, write_json
from tinyllama.loading import HuggingFaceLlama, check_model_folder, load_model, load_tokenizer
from tinyllama.model.flops import num_parameters
from tinyllama.recipe.loading import NAME_PATTERN
from tinyllama.release.card import write_card
from tinyllama.release.formats import (
    CHAT_TEMPLATE,
    LIBRARIES,
    check_format_libraries,
    require_libraries,
    smoke_test,
    write_formats,
)
from tinyllama.release.metadata import check_destination, hash_files
from tinyllama.release.release import show_release_progress, write_hugging_face
from tinyllama.release.verify import compute_reference_outputs, verify_source
from tinyllama.runs.run_dir import ReleaseDir

ALL_FORMATS = ("huggingface", "gguf", "ctranslate2")
_GENERATION = "generation_config.json"


def release_external_weights(source: str, formats: Sequence[str] = ALL_FORMATS, force: bool = False) -> Path:
    """Write `releases/NAME/` from a Hugging Face Llama (a folder or a hub name); return the path of `releases/NAME/`.

    Raises InputError if the source is not a Llama, or if transformers computes different outputs. Also raises
    InputError if a format's library is missing, or if the release exists and `force` is false. Raises RunStoppedError
    if an engine rejects a file. If an engine crashes, the release is written before RunStoppedError is raised.
    """
    llama = HuggingFaceLlama.open(source)
    _reject_escaping_symlinks(llama.folder)
    check_model_folder(llama.folder)
    name = _model_name(Path(source)) if Path(source).exists() else source.partition("/")[2]
    folder = Path("releases") / name
    check_destination(ReleaseDir(folder), force)
    check_format_libraries(formats)
    require_libraries(LIBRARIES["huggingface"])  # transformers computes the outputs of the source
    tokenizer = load_tokenizer(source)
    tokenizer.check_formats(formats)
    metadata: dict[str, Any] = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "step": None,
        "tokens": None,
        "parameters": num_parameters(llama.config, llama.vocab_size),
        "initial_weights": {
            "source": source,
            "digest": llama.digest,
            "config": sha256_of(llama.folder / "config.json"),
            "vocab_size": llama.vocab_size,
        },
        "formats": list(formats),
        "versions": {"tinyllama": version("tinyllama"), "torch": torch.__version__},
    }
    with atomic_directory(folder) as part:
        with show_release_progress(part, folder, metadata["parameters"], formats):
            model = load_model(source)
            write_hugging_face(part / "huggingface", model, tokenizer)
            _copy_chat_settings(llama.folder, part / "huggingface", llama.vocab_size)
            metadata["reference"] = compute_reference_outputs(model, tokenizer)
            del model
            _compare_with_transformers(llama.folder, metadata["reference"])
            write_formats(part, formats, name)
            crash = smoke_test(part, metadata["reference"], in_transformers=True)
        write_json(ReleaseDir(part).metadata_path, {**metadata, "files": hash_files(part)})
        write_card(ReleaseDir(part), None)
    if crash:
        raise RunStoppedError(f"{folder}: released, but {crash}")
    return folder


def _reject_escaping_symlinks(source: Path) -> None:
    """Raise InputError for a symbolic link to a file outside the folder.

    Through such a link, any file on the machine could be copied into the release. Links in the hub's cache are allowed:
    they point to files in `blobs`, next to the folder `snapshots`.
    """
    blobs = source.resolve().parent.parent / "blobs"
    for path in find_escaping_symlinks(source):
        if path.resolve().parent != blobs:
            raise InputError(
                f"{path}: is a link to {path.resolve()}, outside its folder; replace the link with the file"
            )


def _compare_with_transformers(source: Path, reference: dict[str, Any]) -> None:
    """Raise InputError if the outputs of transformers differ from the reference.

    Raises RunStoppedError if transformers crashed, because a crash does not show that the source is invalid.
    """
    failed = next((check for check in verify_source(source, reference) if not check.passed), None)
    if failed is None:
        return
    if failed.remedy:
        raise RunStoppedError(f"{source}: not compared with transformers: {failed.found}; {failed.remedy}")
    if failed.what == "loads and runs":
        raise InputError(f"{source}: transformers cannot run this model ({failed.found}); correct the folder")
    raise InputError(
        f"{source}: transformers and tinyllama compute different outputs ({failed.what}: {failed.found} instead of "
        f"{failed.expected}), so nothing is released; report this with the folder's config.json"
    )


def _copy_chat_settings(source: Path, folder: Path, num_rows: int) -> None:
    """Copy the generation settings and the chat template of a chat model into the release.

    The template is written to a separate file, from which transformers 5 reads it. The embedding has `num_rows` rows;
    special token ids in the settings that have no row are dropped with a warning.
    """
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    if (source / CHAT_TEMPLATE).is_file():
        shutil.copyfile(source / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    elif isinstance(settings.get("chat_template"), str):
        (folder / CHAT_TEMPLATE).write_text(settings["chat_template"], encoding="utf-8")
    if not (source / _GENERATION).is_file():
        return
    generation = {}
    for name, value in read_json(source / _GENERATION).items():
        ids = value if isinstance(value, list) else [value]
        beyond = [number for number in ids if isinstance(number, int) and number >= num_rows]
        if name.endswith("_token_id") and beyond:
            warn_once(f"{source / _GENERATION}: {name} {value} exceeds the embedding's {num_rows} rows; ignored")
            ids = [number for number in ids if number not in beyond]
        if ids not in ([], [None]):
            generation[name] = ids if isinstance(value, list) else value
    write_json(folder / _GENERATION, read_json(folder / _GENERATION) | generation)


def _model_name(source: Path) -> str:
    """Return the name in release.json if the folder belongs to a release, otherwise the folder's own name."""
    for folder in (source, source.resolve().parent):
        release = ReleaseDir(folder)
        if release.exists:
            metadata = read_json(release.metadata_path)
            name = metadata.get("name") if isinstance(metadata, dict) else None
            if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
                raise InputError(f"{release.metadata_path}: {str(name)[:40]!r} is not a valid model name; correct it")
            return name
    return source.resolve().name
