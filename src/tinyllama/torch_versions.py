"""Differences between the versions of torch that tinyllama supports, 2.9 to 2.15. This module does not import torch."""

import dataclasses
from typing import Any

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Names of the allocator's setting. torch 2.9.1 reads only the second, deprecated one (pytorch issue 183387)."""
CHECKPOINT_WARNING = "TypedStorage is deprecated"
"""Warning that DCP of torch 2.9 causes itself when it writes a tensor."""


def known_properties(state: tuple[Any, ...], properties: type) -> tuple[Any, ...]:
    """Return the saved properties of a checkpoint's tensor that the installed torch's class `properties` knows.

    torch 2.15 appends a sixth value, the strides, which earlier versions cannot unpack.
    """
    return state[: len(dataclasses.fields(properties))]
