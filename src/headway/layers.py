"""The small parts of a block: norms, feed-forwards, dropout, and the one table of initial weights."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headway.spec import FeedForwardSpec


def norm(kind: str, width: int, eps: float | None = None) -> nn.Module:
    """A norm over the last `width` numbers; `eps` is added to the variance (default: PyTorch's own)."""
    if kind == "layer":
        return nn.LayerNorm(width) if eps is None else nn.LayerNorm(width, eps)
    return nn.RMSNorm(width, eps)


class Scale(nn.Module):
    """Multiplies a residual branch by a learned vector (LayerScale, 2103.17239)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return x * self.weight


class Table(nn.Linear):
    """A weight that its owner reads as it is, and never calls: kernels by channel, projections of positions. It is
    initialised as a linear's, and nothing packs it."""


class FeedForward(nn.Module):
    """activation(x W) V; gated: (activation(x W) * x U) V (GLU variants, 2002.05202).

    at_once: where it is set, at most so many tokens go through together, so that what lies between stays in the cache.
    """

    at_once: int | None = None

    def __init__(self, width: int, spec: FeedForwardSpec) -> None:
        super().__init__()
        hidden = spec.hidden or 4 * width
        self.activation, self.gated = spec.activation, spec.gated
        self.enter = nn.Linear(width, hidden * (2 if spec.gated else 1), bias=spec.bias)
        self.leave = residual_output(nn.Linear(hidden, width, bias=spec.bias))

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        if self.at_once is None or x.shape[0] * x.shape[1] <= self.at_once:
            return self._apply_to(x)
        parts = x.flatten(0, 1).tensor_split(-(-x.shape[0] * x.shape[1] // self.at_once))
        return torch.cat([self._apply_to(part) for part in parts]).view(x.shape)

    def _apply_to(self, x: Float[Tensor, "*S C"]) -> Float[Tensor, "*S C"]:
        h = self.enter(x)
        if not self.gated:
            return self.leave(activate(h, self.activation))
        gate, h = h.chunk(2, -1)
        return self.leave(activate(gate, self.activation) * h)


def activate(x: Float[Tensor, " *S"], name: str) -> Float[Tensor, " *S"]:
    """The elementwise functions a spec can name; `relu2` is relu squared (2109.08668)."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "silu":
            return F.silu(x)
        case "tanh":
            return torch.tanh(x)
    raise ValueError(f"no activation '{name}'; there is gelu, gelu_tanh, quick_gelu, relu, relu2, silu, tanh")


class Dropout(nn.Module):
    """Dropout that draws one random byte an element, eight to a number: on a CPU drawing is what dropout costs.

    The probability is therefore a multiple of 1/256, from 1/256 to 255/256, and the scale is exact for the one used.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is a share from 0 to below 1, not {p}")
        self.p = p

    def forward(self, x: Float[Tensor, " *S"]) -> Float[Tensor, " *S"]:
        if not self.training or self.p == 0:
            return x
        dropped = min(max(round(256 * self.p), 1), 255)
        if x.device.type != "cpu":
            return F.dropout(x, dropped / 256)
        count = x.numel()
        words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        drawn = words.view(torch.uint8)[:count].view(x.shape)
        return x * ((drawn >= dropped) * (256 / (256 - dropped))).to(x.dtype)


M = TypeVar("M", bound=nn.Module)


def residual_output(linear: M) -> M:
    """Marks the last map of a residual branch, which starts smaller (see `initialise`)."""
    linear.is_residual_output = True  # type: ignore[assignment]
    return linear


def initialise(model: nn.Module, depth: int) -> None:
    """The one table of initial weights; `depth` is the number of residual branches between input and output.

    | what | weights | bias |
    |---|---|---|
    | linear | normal, 1/sqrt(inputs) | 0 |
    | last linear of a residual branch | the same, over sqrt(depth) | 0 |
    | embedding | normal, 1 | |
    | recurrent (LSTM, GRU) | normal, 1/sqrt(hidden); forget gate's bias 1 | 0 |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = depth**-0.5 if getattr(module, "is_residual_output", False) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.RNNBase):
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    nn.init.zeros_(parameter)
                    if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                        nn.init.ones_(parameter[module.hidden_size : 2 * module.hidden_size])
                else:
                    nn.init.normal_(parameter, std=module.hidden_size**-0.5)
