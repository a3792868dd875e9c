"""Learning rate: linear warm-up, cosine, constant tail at the minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    Attributes:
        peak: After the warm-up.
        minimum: At the end of the cosine and over the constant tail.
        warmup: Steps of linear warm-up; shortened when the run is shorter.
        constant: Steps of the tail, at the end; a quarter of the run at most.
        total: Steps of the run.
    """

    peak: float
    minimum: float
    warmup: int
    constant: int
    total: int

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step (from 0)."""
        warmup = min(self.warmup, self.total // 2)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        decay = max(1, self.total - warmup - min(self.constant, self.total // 4))
        progress = min(1.0, (step - warmup) / decay)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * cosine
