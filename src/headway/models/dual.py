"""Dual: two towers whose vectors meet in one space, where near means alike (CLIP, 2103.00020).

score(a, b) = exp(s) f(a) . g(b) + bias, f and g the towers' projections, normalised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headway import models
from headway.spec import Strict


class Spec(Strict, frozen=True):
    """`towers`: two models by name, in order ({"text": ..., "image": ...}), each with a "project" head of equal width.
    `scale`: what the scores are multiplied by at first; `bias`: what is added (SigLIP 2303.15343), None for nothing.
    """

    towers: dict[str, dict[str, Any]]
    scale: float = 1 / 0.07
    bias: float | None = None


class Model(nn.Module):
    """Two towers and the temperature of their scores."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if len(spec.towers) != 2:
            raise ValueError(f"dual: two towers, and this spec has {len(spec.towers)}: {', '.join(spec.towers)}")
        towers: dict[str, Any] = {name: models.assemble(tower) for name, tower in spec.towers.items()}
        self.towers: Any = nn.ModuleDict(towers)
        for name, tower in towers.items():
            if "project" not in getattr(tower, "heads", {}):
                raise ValueError(f"dual: the tower '{name}' has no 'project' head: give it one")
        # vectors of one: FSDP cuts no scalars
        self.scale = nn.Parameter(torch.tensor([math.log(spec.scale)]))
        self.bias = None if spec.bias is None else nn.Parameter(torch.tensor([float(spec.bias)]))
        self.branches = max(tower.branches for tower in towers.values())

    def project(self, name: str, *inputs: Any, **named: Any) -> Float[Tensor, "B P"]:
        """Normalised vectors of one tower's inputs; `inputs` are what that tower's `forward` takes."""
        tower = self.towers[name]
        x = tower(*inputs, **named)
        found = tower.head("project", x, *inputs) if reads_ids(tower) else tower.head("project", x)
        return F.normalize(found, dim=-1)

    def scores(self, one: Float[Tensor, "B P"], two: Float[Tensor, "D P"]) -> Float[Tensor, "B D"]:
        """How alike each of `one` and each of `two` are."""
        found = self.scale.exp() * one @ two.mT
        return found if self.bias is None else found + self.bias


def reads_ids(tower: nn.Module) -> bool:
    """Whether a tower reads tokens, whose heads may pool by ids and padding."""
    return hasattr(tower, "embedding")
