"""Watch: stops a run whose loss is no number or leaps, before the step is taken, and keeps the batches that did it.

A leap is a loss more than `spike` standard deviations above the running mean; both are exponential averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway.recipe import Recipe
from headway.store import write_folder

RATE = 0.05  # of the running mean and variance
WARM = 50  # steps before a leap can be told from the way down


def variance(old: float, value: float, mean: float) -> float:
    """The running variance with one more value, whose running mean before it was `mean`."""
    return 0.0 if math.isnan(mean) else (1 - RATE) * (old + RATE * (value - mean) ** 2)


def fault(recipe: Recipe, step: int, value: float, norm: float, mean: float, spread: float) -> str | None:
    """What is wrong with a step whose loss is `value` and whose gradient's norm is `norm`; None where nothing is."""
    if not math.isfinite(value):
        return f"the loss is {value}"
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm}"
    limit = mean + recipe.spike * math.sqrt(spread)
    if recipe.spike and step >= WARM and value > limit:
        return (
            f"the loss leapt to {value:.4g}, and spike={recipe.spike:g} standard deviations above its mean of "
            f"{mean:.4g} are {limit:.4g},"
        )
    return None


@torch.no_grad()
def flops_per_token(objective: Any, model: nn.Module, batch: Any) -> float:
    """FLOPs of training on a token of this batch, by PyTorch's counter of one forward pass, times three. It sees matrix
    products, but not into fused attention: what it gives is what is called 6 N for a decoder."""
    from torch.utils.flop_counter import FlopCounterMode  # which loads Triton

    with FlopCounterMode(display=False) as counter:
        objective(model, batch)
    return 3.0 * counter.get_total_flops() / max(1, batch.tokens)


def keep(folder: Path, step: int, first: int, stride: int, batches: Sequence[Any], why: str) -> Path:
    """Writes the micro-batches of a step, which are numbered from `first` on, and returns where."""
    tensors: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for i, batch in enumerate(batches):
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        name = f"batch-{first + i * stride}"
        tensors[name] = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        numbers[name] = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
    write_folder(folder, tensors, {"stopped": {"step": step, "why": why, "batches": numbers}})
    return folder
