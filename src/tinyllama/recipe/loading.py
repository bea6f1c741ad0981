"""Loading of recipes: YAML and overrides, the types of fields with their checks, and one-line messages.

A message describes the first problem with its place and remedy.
"""

import dataclasses
import difflib
import json
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from tinyllama.errors import InputError
from tinyllama.formatting import visible

_MAX_RECIPE_BYTES = 1 << 20
"""Maximum size of a recipe in bytes; a comment of 100 MB takes 44 s to parse."""
_AMBIGUOUS_NUMBER = re.compile(r"[-+]?(0[0-9_]|.*:)")
"""Numbers in base 8 and 60 according to YAML 1.1: 010 is 8, and 1:30 is 90."""
# If a union fails, pydantic appends the type of the failed member to the location, as in data.workers.constrained-int.
_PYDANTIC_UNION_TAG = re.compile(r"^(constrained-int|literal\[.*)$")

_short = reprlib.Repr()
_short.maxlevel = 3  # ten YAML aliases can expand to more lists than fit in memory
_short.maxstring = _short.maxother = _short.maxlong = 100

_TOKENS = "train.tokens (the number of training tokens, such as 20M)"
_BATCH, _MICRO_BATCH = "train.batch_sequences", "train.micro_batch_sequences"
_FOREIGN_NAMES = {
    "lr": "train.optimizer.learning_rate", "max_lr": "train.optimizer.learning_rate",
    "min_lr": "train.schedule.final_learning_rate", "lr_scheduler_type": "train.schedule.name",
    "epochs": _TOKENS, "num_epochs": _TOKENS, "num_train_epochs": _TOKENS, "max_steps": _TOKENS, "max_iters": _TOKENS,
    "num_iterations": _TOKENS, "max_tokens": _TOKENS, "batch_size": _BATCH, "global_batch_size": _BATCH,
    "train_batch_size": _BATCH, "total_batch_size": _BATCH, "micro_batch_size": _MICRO_BATCH,
    "device_batch_size": _MICRO_BATCH, "per_device_train_batch_size": _MICRO_BATCH,
    "gradient_accumulation_steps": _MICRO_BATCH, "block_size": "train.sequence_length",
    "seq_len": "train.sequence_length", "max_seq_length": "train.sequence_length",
    "max_seq_len": "train.sequence_length", "max_position_embeddings": "model.context_length",
    "n_embd": "model.dim", "hidden_size": "model.dim", "n_layer": "model.layers", "depth": "model.layers",
    "num_hidden_layers": "model.layers", "n_head": "model.heads", "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads", "intermediate_size": "model.ffn_dim", "wd": "train.optimizer.weight_decay",
    "grad_clip": "train.optimizer.max_gradient_norm", "max_grad_norm": "train.optimizer.max_gradient_norm",
    "clip_grad": "train.optimizer.max_gradient_norm", "warmup_iters": "train.schedule.warmup_steps",
    "eval_steps": "train.validate_every_steps", "eval_interval": "train.validate_every_steps",
    "save_steps": "checkpoint.every_steps", "save_interval": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep", "output_dir": "name (the run's folder is runs/NAME)",
    "out_dir": "name (the run's folder is runs/NAME)", "run_name": "name", "dtype": "train.precision",
    "bf16": "train.precision", "fp16": "train.precision", "gradient_checkpointing": "parallel.activation_checkpointing",
    "init_from": "train.initial_weights", "model_name_or_path": "train.initial_weights",
    "report_to": "track.wandb", "wandb_project": "track.wandb",
}  # fmt: skip
"""Names of the same settings in nanochat, litgpt, nanoGPT and transformers' Trainer."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names that become folders."""
PROTOCOLS = ("file", "local", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Allowed protocols of a source's URL. fsspec supports more protocols, and some of them execute code from a file."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Source and overrides of a recipe. Origins are always equal, so that recipes with the same fields are equal."""

    source: str = dataclasses.field(default="", compare=False)
    """File or name as the user gave it; empty for a recipe that was not loaded."""
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict, compare=False)
    """Overridden values by the dotted names of their fields."""

    def command(self, name: str, default_source: str) -> str:
        """Return the shell command that calls `tinyllama NAME` with this source and these overrides."""
        words = ["tinyllama", *name.split(), self.source or default_source]
        for dotted, value in self.overrides.items():
            words += [f"--{dotted}", value if isinstance(value, str) else json.dumps(value, default=str)]
        return shlex.join(words)


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("tinyllama") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_fields(source: str, overrides: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of a recipe after the overrides, without validation.

    `source` is a YAML file or the name of a bundled recipe. Raises InputError if the file is not a mapping in valid
    YAML.
    """
    path = Path(source)
    if source in bundled_recipes():
        path = Path(str(resources.files("tinyllama") / "recipes" / f"{source}.yaml"))
    elif path.is_dir():
        is_run = (path / "recipe.yaml").is_file()
        remedy = f"give {path / 'recipe.yaml'}" if is_run else f"run: {shlex.join(['tinyllama', 'init', source])}"
        raise InputError(f"{source}: a folder, not a recipe; {remedy}")
    elif not path.is_file():
        raise InputError(f"{source}: no such recipe; give a YAML file or one of {', '.join(bundled_recipes())}")
    with path.open("rb") as file:
        data = file.read(_MAX_RECIPE_BYTES + 1)
    if len(data) > _MAX_RECIPE_BYTES:
        raise InputError(f"{source}: is larger than 1 MiB and therefore not a recipe; give a recipe's file")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{source}: not valid YAML: not UTF-8 text; save it as UTF-8") from None
    fields = parse_yaml(text, source)
    if not isinstance(fields, dict):
        kind = "an empty file" if fields is None else f"a YAML {type(fields).__name__}"
        raise InputError(f"{source}: {kind}, not a mapping; write fields such as name, data, model and train")
    for dotted, value in overrides.items():
        _override(fields, dotted, value)
    return fields


def _override(fields: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if fields.get(parent) is None:  # a run's recipe.yaml has null for unused parts
            fields[parent] = {}
        if parent == "clean" and isinstance(fields[parent], str):
            fields[parent] = {"preset": fields[parent]}
        fields = fields[parent]
        if not isinstance(fields, dict):
            raise InputError(
                f"--{dotted}: {parent} is {abbreviated_repr(fields)} in the recipe and has no fields; "
                "correct the flag or the recipe"
            )
    fields[last] = value


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys and ambiguous numbers.

    The standard loader would silently drop one of two sources with the same name.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise _yaml_error(node, "is larger than any field allows; give a smaller number")
            if isinstance(value, int | float) and _AMBIGUOUS_NUMBER.match(str(node.value)):
                raise _yaml_error(node, f"is read by YAML as {value}; write {value}, or put quotes around text")
            return value
        except (LookupError, TypeError, ValueError):  # raised by yaml for a date such as 2026-13-01 or a number 0x_
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _yaml_error(node, f"is not a valid {kind}; put quotes around text") from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if re.search("[\ud800-\udfff]", str(node.value)):
            raise _yaml_error(node, "contains half of a surrogate pair; remove it")
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _yaml_error(key, "is a duplicate key; rename or delete one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml_error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, f"{abbreviated_repr(node.value)} {problem}", node.start_mark)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML. Raises InputError with `name` and the line number, also for a duplicate key."""
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise InputError(f"{name}: not valid YAML: nested too deeply; remove levels") from None
    except yaml.reader.ReaderError as error:
        raise InputError(
            f"{name}: not valid YAML: character U+{error.character:04X} at {error.position:,}; remove it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark and "\n" in text else ""  # a flag's value is one line
        problem = " ".join(str(getattr(error, "problem", error)).split())
        remedy = "" if "; " in problem else "; correct the indentation, quotes and brackets there"
        raise InputError(f"{name}{place}: not valid YAML: {problem}{remedy}") from None


def differences(*mappings: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the dotted name and the values of each leaf that differs between nested mappings.

    A value is None if its mapping lacks the leaf. Names are in the order of their first appearance.
    """
    flat = [flatten(mapping) for mapping in mappings]
    values = {name: tuple(leaves.get(name) for leaves in flat) for leaves in flat for name in leaves}
    return [(name, own) for name, own in values.items() if any(value != own[0] for value in own)]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name."""
    if not (isinstance(value, dict) and value):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def abbreviated_repr(value: object) -> str:
    """Return a value's `repr`, with the middle omitted if the `repr` is long."""
    return _short.repr(value)


def printable(name: str) -> str:
    """Return a name from a file, or the abbreviated `repr` of a name that is long or not printable."""
    return name if name.isprintable() and len(name) <= _short.maxstring else abbreviated_repr(name)


def format_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line about the first problem: place, value and remedy. `model` is the validated class."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if not _PYDANTIC_UNION_TAG.search(str(part))]
    dotted = ".".join(map(printable, place))
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown field; {_suggest_field(place, model)}"
    if problem["type"] == "missing":
        required = [name for name, field in _part(place, model).model_fields.items() if field.is_required()]
        return f"{dotted}: missing; add it" + (f" with its fields {' and '.join(required)}" if required else "")
    message = problem["msg"].removeprefix("Value error, ")
    if not dotted or isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    # Turn pydantic's "Input should be ..., unable to ..." into "should be ...", the end of a sentence about the value.
    predicate = message.split(", unable to", maxsplit=1)[0].replace("Input should be", "should be")
    return f"{dotted}: {abbreviated_repr(problem['input'])} {predicate[0].lower()}{predicate[1:]}"


def _part(place: Sequence[str], model: Any) -> Any:
    """Return the type of the field at a place in a recipe; a type without fields is replaced by `BaseModel`."""
    part: Any = model
    for name in place:
        is_part = hasattr(part, "model_fields")
        if is_part:
            part = part.model_fields[name].annotation if name in part.model_fields else BaseModel
        if not is_part or isinstance(part, UnionType):  # an element of a dict or tuple of parts, or an optional part
            part = next((inner for inner in get_args(part) if hasattr(inner, "model_fields")), BaseModel)
    return part if hasattr(part, "model_fields") else BaseModel


def _suggest_field(place: list[str], model: type[BaseModel]) -> str:
    part = _part(place[:-1], model)
    siblings = suggest(place[-1], list(part.model_fields))
    if siblings.startswith("did you mean") and place[-1].lower() not in _FOREIGN_NAMES:
        return siblings
    return suggest_recipe_field(place[-1], model) or siblings


def suggest_recipe_field(name: str, model: type[BaseModel], prefix: str = "") -> str:
    """Return a hint with the dotted name of the field of a recipe that `name` may mean, or an empty string.

    `name` may be the usual name of another program, a field's last name, or similar to one. `prefix` is put before each
    field.
    """
    last = name.rpartition(".")[2].replace("-", "_").lower()
    if last in _FOREIGN_NAMES:
        return f"did you mean {prefix}{_FOREIGN_NAMES[last]}?"
    fields = [field for field, _ in field_infos(model)]
    close = difflib.get_close_matches(last, [field.rpartition(".")[2] for field in fields], n=1, cutoff=0.75)
    found = [prefix + field for field in fields if field.rpartition(".")[2] in close]
    return f"did you mean {' or '.join(found)}?" if found else ""


def field_infos(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name and the description of each field of a model and its parts, except in a mapping or list."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from field_infos(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def suggest(name: str, known: Sequence[str], cutoff: float = 0.6, otherwise: str = "") -> str:
    """Return a hint: the known name most similar to `name`.

    If no similarity reaches `cutoff` (0 to 1), returns `otherwise` or, if it is empty, all known names.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else otherwise or f"known are {', '.join(known) or 'none'}"


def parse_tokens(value: object) -> object:
    """Parse a token count such as `3T`, `105B`, `20M`, `512K` or `2e6`; return values of other types unchanged.

    Raises ValueError for other strings and for counts above 1e18.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"((?:[0-9]+(?:_[0-9]+)*)?\.?[0-9]+(?:e[0-9]+)?)\s*([KMBT]?)", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError("is not a count of tokens such as 3T, 105B, 20M or 2e6")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if count > 1e18:
        raise ValueError("is more than 1e18 tokens; give fewer")
    return round(count)


def check_protocol(path: str) -> str:
    """Check and return a path or URL. Raises ValueError for chained URLs and for protocols not in PROTOCOLS."""
    protocol, is_url, _ = path.partition("://")
    if is_url and ("::" in path or protocol not in PROTOCOLS):
        raise ValueError(f"is not a supported URL; give a local path, or one URL of {', '.join(PROTOCOLS)}")
    return path


Address = Annotated[str, Field(min_length=1), AfterValidator(check_protocol)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
# The escapes \n and \t are interpreted here, because plain and single-quoted YAML strings and a shell do not interpret
# them.
Separator = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: text.replace("\\n", "\n").replace("\\t", "\t"))
]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""Validator of a list that accepts a string in place of a list of one string."""
Strings = Annotated[tuple[str, ...], OneOrMore]
TokenCount = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
TokenCountOrZero = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]


class RecipeModel(BaseModel):
    """Base class of a recipe's parts: frozen models that reject unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_for_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `layers: true` as one layer.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is true or false in YAML; put quotes around text, or give a number")
        return value

    @field_validator("*")
    @classmethod
    def _reject_control_characters(cls, value: object, info: ValidationInfo) -> object:
        # Strings are printed, and used as paths and arguments. Only a separator may contain any control character.
        line_breaks = set() if info.field_name == "sample_prompts" else {"\n", "\t"}
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        texts = [text for text in inner if isinstance(text, str)]
        is_bad = any(visible(text) != text or set(text) & line_breaks for text in texts)
        if is_bad and info.field_name != "separator":
            raise ValueError("contains a control character; remove it")
        return value
