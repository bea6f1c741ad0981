"""What a run is: one YAML file, read into frozen pydantic models.

Everything that a stage needs stands in the recipe, with its unit in its name or its docstring. The digest covers
the fields that change the weights beyond rounding, so a run can say whether it still is the run it was.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from tinyllama.errors import InputError
from tinyllama.recipe.data_schema import Data
from tinyllama.recipe.fields import NAME_PATTERN, Count, Positive, RecipeModel
from tinyllama.recipe.messages import abbreviated_repr, format_validation_error, has_lone_surrogate
from tinyllama.recipe.train_schema import Checkpoint, Guard, Parallel, Release, Track, Train


class Model(RecipeModel):
    """The network's shape: Llama 2's."""

    dim: Count
    """Width of the residual stream."""
    layers: Count
    """Transformer blocks."""
    heads: Count
    """Query heads."""
    kv_heads: Count
    """Key and value heads; each serves heads / kv_heads query heads."""
    ffn_dim: Count
    """Width of the SwiGLU feed-forward network."""
    context_length: Count = 2048
    """Longest sequence in tokens that the model is meant for."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    tie_embeddings: bool = False
    """Whether the output head is the input embedding."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} do not divide dim {self.dim}; choose heads that do")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}; choose kv_heads that do")
        if self.head_dim % 2:
            raise ValueError(f"dim / heads is {self.head_dim}; rotary embeddings need an even number")
        return self


class Recipe(RecipeModel):
    """Everything that a run is."""

    name: str = Field(pattern=NAME_PATTERN)
    """Names the run's folder and its releases."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Of the initial weights and the order of the data."""
    tokenizer: str
    """Folder, file or hub name."""
    data: Data
    """Where the text comes from."""
    model: Model
    """The network."""
    train: Train
    """The training."""
    parallel: Parallel = Parallel()
    """How the work is shared out."""
    checkpoint: Checkpoint = Checkpoint()
    """The checkpoints."""
    guard: Guard = Guard()
    """What is done about steps that go wrong."""
    release: Release = Release()
    """The releases."""
    track: Track = Track()
    """The trackers."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.train.sequence_length > self.model.context_length:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is longer than "
                f"model.context_length {self.model.context_length}; make it shorter"
            )
        if self.release.average_checkpoints > self.checkpoint.keep:
            raise ValueError(
                f"release.average_checkpoints {self.release.average_checkpoints} is more than "
                f"checkpoint.keep {self.checkpoint.keep}; keep as many checkpoints as a release averages"
            )
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, object] | None = None) -> "Recipe":
        """Read a recipe from a path or by a bundled recipe's name.

        `overrides` replaces single fields by their dotted names: `{"train.tokens": "5M"}`.
        Raises InputError with the file, the field, the value and the remedy.
        """
        path = _resolve_recipe_path(str(source))
        fields = _read_yaml(path)
        for dotted, value in (overrides or {}).items():
            _set(fields, dotted, value)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(f"{path}: {format_validation_error(error, cls)}") from None

    @property
    def has_milestones(self) -> bool:
        """Whether the run releases checkpoints at token milestones."""
        return bool(self.release.at_tokens or self.release.every_tokens)

    def milestone_steps(self) -> set[int]:
        """Return the steps, counted from 1, that reach one of `release.at_tokens` or a multiple of `every_tokens`."""
        batch, last, every = self.train.batch_tokens, self.train.steps, self.release.every_tokens
        tokens = {*self.release.at_tokens, *(range(every, last * batch + 1, max(every, batch)) if every else ())}
        return {step for step in (-(-count // batch) for count in tokens) if step <= last}

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fields_affecting_weights(self) -> dict[str, Any]:
        """Dotted name -> value of each field that changes the weights beyond rounding."""
        fields = dict(flatten(self.model_dump(mode="json")))
        changing = {name: value for name, value in fields.items() if not _FIELDS_NOT_AFFECTING_WEIGHTS.match(name)}
        return changing | {"data.sources": list(self.data.sources)}  # their order is part of the data's

    @property
    def digest(self) -> str:
        """SHA-256 of `weight_fields`."""
        return hashlib.sha256(json.dumps(self.fields_affecting_weights(), sort_keys=True).encode()).hexdigest()


# Neither where things lie nor how the work is cut up, watched or kept changes what is learnt.
_FIELDS_NOT_AFFECTING_WEIGHTS = re.compile(
    r"name$|tokenizer$|data\.(store|workers|executor|slurm.*|sources\.[^.]+\.(path|max_compression_ratio))$"
    r"|checkpoint\.|release\.|track\."
    r"|train\.(micro_batch_sequences|deterministic|compile|validate_every_steps|validation_sequences)$"
    r"|parallel\.|guard\.(watchdog_seconds|max_rollbacks)$"
)


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("tinyllama") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _resolve_recipe_path(source: str) -> Path:
    if source in bundled_recipes():
        return Path(str(resources.files("tinyllama") / "recipes" / f"{source}.yaml"))
    path = Path(source)
    if path.is_file():
        return path
    raise InputError(f"{source}: no such recipe; give a YAML file or one of {', '.join(bundled_recipes())}")


_SURPRISING = re.compile(r"[-+]?(0[0-9_]|.*:)")
"""Numbers of base 8 and 60, by YAML 1.1: 010 is 8, and 1:30 is 90."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a name given twice is an error: of two sources with one name, one would be lost."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise _refusal(node, "is more than any field counts; give less")
            if isinstance(value, int | float) and _SURPRISING.match(str(node.value)):
                raise _refusal(node, f"is read by YAML as {value}; write that, or put a text in quotes")
            return value
        except (LookupError, TypeError, ValueError):  # the loader's own, of a date such as 2026-13-01 or a number 0x_
            raise _refusal(node, f"is no {node.tag.removeprefix('tag:yaml.org,2002:')}; put a text in quotes") from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if has_lone_surrogate(str(node.value)):
            raise _refusal(node, "holds half of a surrogate pair; take it out")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _refusal(key, "stands here a second time; rename or delete one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _refusal(node: yaml.Node, reason: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, f"{abbreviated_repr(node.value)} {reason}", node.start_mark)


_MOST_BYTES = 1 << 20
"""Size of a recipe; a comment of 100 MB took 44 s to parse."""


def _read_yaml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"{path}: is larger than 1 MiB, which no recipe is; name the recipe's own file")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid YAML: is not UTF-8 text; save it as that") from None
    fields = parse_yaml(text, str(path))
    if not isinstance(fields, dict):
        kind = "an empty file" if fields is None else f"a YAML {type(fields).__name__}"
        raise InputError(f"{path}: {kind}, not a mapping; write fields such as name, data, model and train")
    return fields


def parse_yaml(text: str, name: str) -> Any:
    """The value that YAML says; a key given twice is an error. Raises InputError with `name` and the line."""
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise InputError(f"{name}: not valid YAML: nested too deeply; take levels out") from None
    except yaml.reader.ReaderError as error:
        raise InputError(
            f"{name}: not valid YAML: character U+{error.character:04X} at {error.position:,}; take it out"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        remedy = "" if "; " in problem else "; correct the indentation, quotes and brackets there"
        raise InputError(f"{name}{place}: not valid YAML: {problem}{remedy}") from None


def _set(fields: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if fields.get(parent) is None:  # as a run's own recipe.yaml has what is not used
            fields[parent] = {}
        fields = fields[parent]
        if not isinstance(fields, dict):
            raise InputError(
                f"--{dotted}: {parent} is {abbreviated_repr(fields)} in the recipe and has no fields; correct one"
            )
    fields[last] = value


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each leaf of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
