"""What the parts of a recipe are made of: frozen pydantic models and fields that name their unit."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from tinyllama.formatting import visible

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: object) -> object:
    """Read a count of tokens: `3T`, `105B`, `20M`, `512K`, `2e6`, or a plain number."""
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
    """Return a path or URL. Raises ValueError for a URL of a protocol that is not in PROTOCOLS, and for a chain."""
    protocol, is_url, _ = path.partition("://")
    if is_url and ("::" in path or protocol not in PROTOCOLS):
        raise ValueError(f"is a URL that is not read; give a local path, or one URL of {', '.join(PROTOCOLS)}")
    return path


PROTOCOLS = ("file", "local", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""What the URL of a source may begin with. fsspec knows more, and some of them run code that a file holds."""
Address = Annotated[str, AfterValidator(check_protocol)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of names that become folders."""
Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class RecipeModel(BaseModel):
    """A mapping of named fields; an unknown name is an error, and nothing changes once it is read."""

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
    def _no_control_characters(cls, value: object, info: ValidationInfo) -> object:
        # Texts are printed, and become paths and arguments. A separator alone may be one, such as a form feed.
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        texts = [text for text in inner if isinstance(text, str)]
        is_bad = any(visible(text) != text or set(text) & {"\n", "\t"} for text in texts)
        if is_bad and info.field_name != "separator":
            raise ValueError("holds a control character; take it out")
        return value
