"""The `model` part of a recipe: the shape of the network, and its rotary position embedding."""

from typing import Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator
from pydantic_core import PydanticUseDefault

from tinyllama.recipe.loading import Count, Positive, RecipeModel

_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_context_length")
_MAX_CONTEXT_RATIO = 2
"""Maximum context of scaling llama3, relative to the original context times `factor`. The ratio is 2 in Llama 3.1 and
3.3, and 0.5 in Llama 3.2."""


class RopeScaling(RecipeModel):
    """Scaling of the rotary embedding's frequencies, for a longer context."""

    type: Literal["llama3", "linear"]
    """`llama3`: divides only low frequencies, as Llama 3.1 does. `linear`: divides all frequencies by `factor`."""
    factor: float = Field(ge=1)
    """Divisor of the frequencies."""
    low_freq_factor: Positive | None = None
    """For llama3 only: frequencies with fewer rotations than this in the original context are divided by `factor`."""
    high_freq_factor: Positive | None = None
    """For llama3 only: frequencies with more rotations than this in the original context do not change. Frequencies
    between the two limits are interpolated."""
    original_context_length: Count | None = None
    """For llama3 only: context length before the scaling."""

    @model_validator(mode="after")
    def _check_fields_of_type(self) -> Self:
        given = {name: getattr(self, name) for name in _LLAMA3_FIELDS}
        if self.type == "linear":
            if extra := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"type linear has no {extra[0]}; remove it, or use type llama3")
            return self
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"type llama3 needs {', '.join(missing)}; add the values of the original model")
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        if low >= high:
            raise ValueError(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}; correct one of them")
        return self


class Model(RecipeModel):
    """Shape of the model, which has the architecture of Llama 2 and Llama 3."""

    dim: Count
    """Width of the residual stream."""
    layers: Count
    """Number of transformer blocks."""
    heads: Count
    """Number of query heads."""
    kv_heads: Count
    """Number of key/value heads; `heads / kv_heads` query heads share one key/value head."""
    head_dim: int = Field(  # pydantic 2.10 accepts no default factory for `Count`
        gt=0,
        default_factory=lambda fields: fields.get("dim", 0) // fields.get("heads", 1),  # an invalid field is missing
    )
    """Width of one head; null means `dim / heads`."""
    ffn_dim: Count
    """Width of the SwiGLU feed-forward network."""
    context_length: Count = 2048
    """Maximum sequence length."""
    norm_eps: Positive = 1e-5
    """Constant added to the mean square in RMSNorm."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary embedding's frequencies; null means none."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""

    @field_validator("head_dim", mode="before")
    @classmethod
    def _replace_null(cls, value: object) -> object:
        if value is None:
            raise PydanticUseDefault
        return value

    @field_serializer("head_dim")
    def _default_as_null(self, value: int) -> int | None:
        # In a saved recipe, the default still depends on `dim` and `heads`, which an override may change.
        return None if value * self.heads == self.dim else value

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if self.dim % self.heads:  # transformers refuses this even if `head_dim` is given
            raise ValueError(f"heads {self.heads} do not divide dim {self.dim}; choose heads that do")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}; choose kv_heads that do")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; choose an even number, as rotary embeddings need")
        return self

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        scaling = self.rope_scaling
        if scaling is None or scaling.original_context_length is None:  # `linear` does not give the original context
            return self
        limit = int(_MAX_CONTEXT_RATIO * scaling.factor * scaling.original_context_length)
        if self.context_length > limit:
            raise ValueError(
                f"context_length {self.context_length} is beyond what rope_scaling allows, {limit}, which is "
                f"{_MAX_CONTEXT_RATIO} x factor {scaling.factor:g} x original_context_length "
                f"{scaling.original_context_length}; reduce context_length, or raise factor"
            )
        return self
