"""The base class of a recipe's parts, and the types of their fields."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from tinyllama.formatting import visible

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names that become folders."""
PROTOCOLS = ("file", "local", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Allowed protocols of a source's URL. fsspec supports more protocols, and some of them execute code from a file."""


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
# These escapes are interpreted here, because plain and single-quoted YAML strings and a shell do not interpret them.
Separator = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: text.replace("\\n", "\n").replace("\\t", "\t"))
]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Strings = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
TokenCount = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
TokenCountOrZero = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]


class RecipeModel(BaseModel):
    """A frozen mapping of named fields, in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_for_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `layers: true` as one layer.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is true or false in YAML; put a text in quotes, or give a number")
        return value

    @field_validator("*")
    @classmethod
    def _reject_control_characters(cls, value: object, info: ValidationInfo) -> object:
        # Strings are printed, and used as paths and arguments. Only a separator may contain a control character.
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        texts = [text for text in inner if isinstance(text, str)]
        is_bad = any(visible(text) != text or set(text) & {"\n", "\t"} for text in texts)
        if is_bad and info.field_name != "separator":
            raise ValueError("contains a control character; remove it")
        return value
