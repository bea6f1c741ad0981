"""What a run is: one YAML file, read into frozen pydantic models.

Everything that a stage needs stands in the recipe, with its unit in its name or its docstring. The digest covers
the fields that change the weights beyond rounding, so a run can say whether it still is the run it was.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tinyllama.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: object) -> object:
    """Read a count of tokens: `3T`, `105B`, `20M`, `512K`, `2e6`, or a plain number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBT]?)", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError("is not a count of tokens such as 3T, 105B, 20M or 2e6")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if count > 1e18:
        raise ValueError("is more than 1e18 tokens; give fewer")
    return round(count)


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true_or_false(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `layers: true` as one layer.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is true or false; give a value")
        return value


class Source(_Part):
    """One data set and its share of the mix."""

    format: Literal["slimpajama", "starcoderdata", "jsonl", "parquet", "text", "csv"]
    """How its files are read."""
    path: str
    """Folder, file or glob; a folder is read with everything below it, in sorted order."""
    weight: Positive
    """Share of every batch, relative to the other sources' weights."""
    text: str = "text"
    """Field or column that holds a document (jsonl, parquet, csv)."""
    exclude: tuple[str, ...] = ()
    """Subsets left out: SlimPajama's `redpajama_set_name`, Starcoderdata's languages."""
    languages: tuple[str, ...] = ()
    """Starcoderdata's languages to read; none named means all."""


class Markers(_Part):
    """What stands around each document in the token store."""

    start: bool = True
    """Put `<s>` before each document."""
    end: bool = True
    """Put `</s>` after each document."""


class Stage(_Part):
    """A mix that holds from a token count on."""

    from_tokens: Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]
    """Tokens seen when the mix begins; it takes effect at the next step boundary."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Share of each source; a source that is not named has none."""


class Data(_Part):
    """Where the text comes from and where its tokens go."""

    store: str
    """Folder of the token store: `prepare` writes it, `train` reads it."""
    workers: Count | Literal["auto"] = "auto"
    """Processes that prepare; never changes the bytes. `auto`: one a core."""
    sources: dict[SourceName, Source] = Field(min_length=1)
    """The data sets, by name: letters, digits, `_` and `-`; each has a folder of that name in the store."""
    stages: tuple[Stage, ...] = ()
    """Mixes that replace the sources' weights from a token count on, in rising order."""
    document: Markers = Markers()
    """Markers around each document."""
    holdout: Share = 0.0005
    """Share of documents kept for validation where a source has no such split; by content hash."""


class Model(_Part):
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
    context: Count = 2048
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


class Optimizer(_Part):
    """AdamW; weight decay on matrices only."""

    name: Literal["adamw"] = "adamw"
    """The update rule."""
    learning_rate: Positive
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the running mean and of the running square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay a step, times the learning rate."""
    clip_norm: Positive = 1.0
    """Largest global norm of the gradient."""


class Schedule(_Part):
    """The learning rate over the run: warm-up, then cosine; or warm-up, stable, decay (WSD)."""

    name: Literal["cosine", "wsd"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear rise to the peak."""
    final_learning_rate: Annotated[float, Field(ge=0)]
    """Learning rate at the last step."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """WSD only: the share of all steps over which it falls at the end."""


class Train(_Part):
    """How the model is trained."""

    tokens: Tokens
    """Tokens to train on, over the whole run."""
    sequence_length: Count
    """Tokens a row that the model predicts."""
    batch_sequences: Count
    """Rows of a step's whole batch, over all ranks."""
    micro_batch_sequences: Count
    """Rows that one rank puts through the model at a time, at most: the largest divisor of its rows is taken."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the computation; weights, optimiser state and gradient sums are always float32."""
    compile: bool = True
    """Compile the blocks with torch.compile."""
    optimizer: Optimizer
    """The update rule and its constants."""
    schedule: Schedule
    """The learning rate over the run."""
    validate_every_steps: Count = 1000
    """Steps between two validations; the last step is always validated."""
    validation_sequences: Count = 1024
    """Rows of a validation at most, over all sources, shared out by their weights."""

    @property
    def batch_tokens(self) -> int:
        """Tokens a step."""
        return self.batch_sequences * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run: the last one reaches `tokens`."""
        return -(-self.tokens // self.batch_tokens)


class Checkpoint(_Part):
    """When the run can be picked up again."""

    every_steps: Count = 1000
    """Steps between two checkpoints; the last step always makes one."""
    keep: Count = 3
    """Newest checkpoints that are kept."""


class Release(_Part):
    """What a release is scored on."""

    tasks: tuple[str, ...] = ("hellaswag",)
    """lm-eval tasks."""
    limit: Count | None = None
    """Items a task at most: the first in the task's order; null means all."""


class Track(_Part):
    """Where the metrics go besides metrics.jsonl."""

    trackio: bool = True
    """Log to trackio, in a folder beside the run."""


class Recipe(_Part):
    """Everything that a run is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
    checkpoint: Checkpoint = Checkpoint()
    """The checkpoints."""
    release: Release = Release()
    """The releases."""
    track: Track = Track()
    """The trackers."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.train.sequence_length > self.model.context:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is longer than "
                f"model.context {self.model.context}; make it shorter"
            )
        starts = [stage.from_tokens for stage in self.data.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"data.stages begin at {starts}; put them in rising order")
        for stage in self.data.stages:
            for name in stage.weights.keys() - self.data.sources.keys():
                raise ValueError(f"data.stages name a source {name!r} that data.sources lacks")
            if not sum(stage.weights.values()):
                raise ValueError("data.stages has a stage whose weights sum to nothing")
        return self

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, object] | None = None) -> "Recipe":
        """Read a recipe from a path or by a bundled recipe's name.

        `overrides` replaces single fields by their dotted names: `{"train.tokens": "5M"}`.
        Raises InputError with the file, the field, the value and the remedy.
        """
        path = _find(str(source))
        fields = _read_yaml(path)
        for dotted, value in (overrides or {}).items():
            _set(fields, dotted, value)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(f"{path}: {_first_problem(error)}") from None

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def weight_fields(self) -> dict[str, Any]:
        """Dotted name -> value of each field that changes the weights beyond rounding."""
        fields = dict(flatten(self.model_dump(mode="json")))
        changing = {name: value for name, value in fields.items() if not _NEUTRAL.match(name)}
        return changing | {"data.sources": list(self.data.sources)}  # their order is part of the data's

    @property
    def digest(self) -> str:
        """SHA-256 of `weight_fields`."""
        return hashlib.sha256(json.dumps(self.weight_fields(), sort_keys=True).encode()).hexdigest()


# Neither where things lie nor how the work is cut up, watched or kept changes what is learnt.
_NEUTRAL = re.compile(
    r"name$|tokenizer$|data\.(store|workers|sources\.[^.]+\.path)$|checkpoint\.|release\.|track\."
    r"|train\.(micro_batch_sequences|compile|validate_every_steps|validation_sequences)$"
)


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("tinyllama") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _find(source: str) -> Path:
    if source in bundled_recipes():
        return Path(str(resources.files("tinyllama") / "recipes" / f"{source}.yaml"))
    path = Path(source)
    if path.is_file():
        return path
    raise InputError(f"{source}: no such recipe; give a YAML file or one of {', '.join(bundled_recipes())}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not UTF-8 text"
        raise InputError(f"{path}{place}: not valid YAML: {problem}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: a recipe is a mapping of fields such as name, data, model and train")
    return fields


def _set(fields: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = fields.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"--{dotted}: {parent} holds no fields; see the recipe")
        fields = inner
    fields[last] = value


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each leaf of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


# pydantic names the arm of a union that failed, such as data.workers.constrained-int, which is no field.
_UNION_ARM = re.compile(r"^(constrained-int|literal\[.*)$")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if not _UNION_ARM.search(str(part))]
    dotted = ".".join(place)
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown field; {_nearest(place)}"
    if problem["type"] == "missing":
        return f"{dotted}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if not dotted or isinstance(problem["input"], dict):
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {problem['input']!r} {_predicate(message)}"


def _predicate(message: str) -> str:
    """Turn pydantic's "Input should be …, unable to …" into the end of a sentence about the value."""
    message = message.split(", unable to", maxsplit=1)[0].replace("Input should be", "should be")
    return message[0].lower() + message[1:]


def _nearest(place: list[str]) -> str:
    part: Any = Recipe
    for name in place[:-1]:
        if hasattr(part, "model_fields"):
            part = part.model_fields[name].annotation
        else:  # a name in a dict of parts, or a place in a tuple of them
            part = next(inner for inner in get_args(part) if hasattr(inner, "model_fields"))
    known = list(part.model_fields)
    close = difflib.get_close_matches(place[-1], known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
