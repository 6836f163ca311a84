"""Schedules: the rate's way through the budget, by name, as a share of its peak.

Up over `warmup` steps, level, then down over the last `decay` share of the budget: along a line, along half a cosine
(1608.03983), or as 1 - sqrt (`wsd`: warm-up, stable, decay; 2404.06395, 2405.18392). `constant` stays up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from headway.recipe import OptimizerSpec

# what is left of the rate once a share x of the way down is behind it
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "wsd": lambda x: 1.0 - math.sqrt(x),
    "constant": lambda x: 1.0,
}


def scale(spec: OptimizerSpec, step: int, fraction: float) -> float:
    """The rate at a step, counted from 0, when `fraction` of the budget is spent; 1 is its peak."""
    rising = min(1.0, (step + 1) / max(1, spec.warmup))
    if not spec.decay:
        return rising
    return rising * FALLS[spec.schedule](max(0.0, 1.0 - (1.0 - fraction) / spec.decay))
