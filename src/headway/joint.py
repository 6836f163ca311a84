"""Joint: linears of one input multiplied as one, y = x [W_1; W_2]^T, while each stays a module that can be asked."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Part(nn.Module):
    """Some outputs of a linear that others read too: who asks first multiplies for all who ask about that input."""

    def __init__(self, joint: Joint, begin: int, end: int) -> None:
        super().__init__()
        self.joint, self.begin, self.end = joint, begin, end
        self.in_features, self.out_features = joint.whole.in_features, end - begin

    @property
    def weight(self) -> Tensor:
        """Tells dtype and device; the weights are the whole's."""
        return self.joint.whole.weight

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        return self.joint(x)[..., self.begin : self.end]

    def apart(self) -> nn.Linear:
        """A linear of its own again."""
        whole = self.joint.whole
        weight, bias = (
            None if t is None else nn.Parameter(t[self.begin : self.end].detach().clone())
            for t in (whole.weight, whole.bias)
        )
        return linear_of(weight, bias)


class Joint(nn.Module):
    """A linear of several parts; it holds its last answer until each part has asked."""

    def __init__(self, whole: nn.Linear, parts: int) -> None:
        super().__init__()
        self.whole: Any = whole
        self.parts = parts
        self.kept: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        kept, self.kept = self.kept, None
        if kept is None or kept[0] is not x:
            kept = (x, self.whole(x), self.parts)
        if kept[2] > 1:
            self.kept = (x, kept[1], kept[2] - 1)
        return kept[1]


def linear_of(weight: Any, bias: nn.Parameter | None) -> nn.Linear:
    """A linear of these very parameters; none of its own are drawn before."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear
