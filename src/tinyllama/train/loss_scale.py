"""Loss scaling for fp16, whose smallest gradients would otherwise become zero.

The scale multiplies the loss before the backward pass, and the gradient is divided by it before clipping. All scales
are powers of two, so the division is exact. The rules and the constants are those of torch.amp.GradScaler (Micikevicius
et al. 2018, arXiv:1710.03740, section 3.2). There are two exceptions: a loss that is not finite does not change the
scale, and the scale does not fall below 1. GradScaler itself keeps its state on the GPU, so the training loop would
wait for the GPU twice per step. The gradient norm, which the loop reads anyway, contains the same information.
"""

import math
from typing import Any

from tinyllama.train.guard import Action, Decision

INITIAL_SCALE = 65_536.0
GROWTH_INTERVAL = 2_000
"""Number of consecutive steps with a finite gradient after which the scale doubles."""


class LossScale:
    """Loss scale of a run. It is always 1 unless the precision is fp16."""

    def __init__(self, precision: str, state: dict[str, Any] | None = None) -> None:
        """Create a scale that continues from `state`, the result of an earlier scale's `state()`."""
        self.is_dynamic = precision == "fp16"
        start = {"scale": INITIAL_SCALE if self.is_dynamic else 1.0, "finite_steps": 0}
        known = state if self.is_dynamic and state else start
        self.value = float(known["scale"])
        self.finite_steps = int(known["finite_steps"])

    def state(self) -> dict[str, Any] | None:
        """Return the state that a checkpoint stores, as JSON values; None unless the precision is fp16."""
        return {"scale": self.value, "finite_steps": self.finite_steps} if self.is_dynamic else None

    def check(self, loss: float, norm: float) -> Decision | None:
        """Update the scale after a step; return the decision to skip the step if its gradient overflowed, else None.

        `norm` is the gradient norm over all ranks, so all ranks have the same scale. The guard decides on a loss that
        is not finite, because the loss does not depend on the scale, and on all steps with a scale of 1.
        """
        if not self.is_dynamic or not math.isfinite(loss):
            return None
        if math.isfinite(norm):
            self.finite_steps += 1
            if self.finite_steps == GROWTH_INTERVAL:
                self.value, self.finite_steps = 2 * self.value, 0
            return None
        self.finite_steps = 0
        if self.value == 1:
            return None
        decision = Decision(Action.OVERFLOW, f"gradient overflow at a loss scale of {self.value:,.0f}", 0)
        self.value /= 2
        return decision
