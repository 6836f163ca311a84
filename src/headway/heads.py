"""Heads: what a model's hidden states become.

out(norm(activation(dense(pool(x))))), every part but one of them possibly absent: a language model's logits, a masked
one's with a transform before, the class of a sequence or of each token, the span of an answer, a projection, a pool.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.layers import activate, norm
from headway.spec import Activation, Epsilon, Norm, Size, Strict


class HeadSpec(Strict, frozen=True):
    """pool -> dense -> activation -> norm -> out.

    pool: which tokens: all of them ("none"), the first, the last valid one, the mean of the valid ones, the first one
    whose id is `end`, the largest id ("largest", of old CLIP checkpoints), the first beside the mean of those behind
    the prefix ("first_and_mean"), or the first two, each with outputs of its own, which are averaged ("first_two", of
    distilled DeiT, 2012.12877).
    dense: a linear map of the width before the activation. outputs: of the last linear; None leaves it out. tie: its
    weight is the embedding's. labels: what the outputs are called.
    """

    pool: Literal["none", "first", "last", "mean", "end", "largest", "first_and_mean", "first_two"] = "none"
    end: int | None = None
    prefix: Annotated[int, Meta(ge=0)] = 1
    before: Norm | None = None
    dense: bool = False
    activation: Activation | None = None
    norm: Norm | None = None
    norm_eps: Epsilon | None = None
    outputs: Size | None = None
    bias: bool = True
    tie: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != self.outputs:
            raise ValueError(f"a head with {self.outputs} outputs has as many labels, not {len(self.labels)}")
        if (self.end is None) == (self.pool == "end"):
            raise ValueError("a head pools at `end` where pool is 'end', and there alone: give both or neither")
        if self.tie and self.outputs is None:
            raise ValueError("a head without outputs has no weight to tie: give it outputs, or leave out tie")
        if self.pool == "first_two" and self.outputs is None:
            raise ValueError("a head of the first two tokens averages their outputs: say how many outputs")


class Head(nn.Module):
    """One head; `embedding` is the table that a tied one shares."""

    def __init__(self, width: int, spec: HeadSpec, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.spec = spec
        inner = 2 * width if spec.pool == "first_and_mean" else width
        self.before = norm(spec.before, width, spec.norm_eps) if spec.before else nn.Identity()
        self.dense = nn.Linear(inner, inner) if spec.dense else nn.Identity()
        self.norm = norm(spec.norm, inner, spec.norm_eps) if spec.norm else nn.Identity()
        self.out: nn.Module = nn.Identity()
        if spec.outputs is not None:
            self.out = nn.Linear(inner, spec.outputs * (2 if spec.pool == "first_two" else 1), bias=spec.bias)
            if spec.tie:
                if embedding is None or embedding.weight.shape != self.out.weight.shape:
                    raise ValueError(f"a head with {spec.outputs} outputs cannot share this model's embedding")
                self.out.weight = embedding.weight

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        ids: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B *T O"]:
        """`ids` where it pools by them; `valid` is false at padding. Pooled heads give `Float[B O]`."""
        x = self.dense(self.before(pool(x, self.spec, ids, valid)))
        if self.spec.activation is not None:
            x = activate(x, self.spec.activation)
        x = self.out(self.norm(x))
        if self.spec.pool == "first_two":
            return x.unflatten(-1, (2, -1)).diagonal(dim1=1, dim2=2).mean(-1)
        return x


def pool(x: Float[Tensor, "B T C"], spec: HeadSpec, ids: Tensor | None, valid: Tensor | None) -> Tensor:
    """The tokens that a head reads: `Float[B T C]` for all of them, else `Float[B C]`."""
    rows, length = x.shape[:2]
    row = torch.arange(rows, device=x.device)
    match spec.pool:
        case "none":
            return x
        case "first":
            return x[:, 0] if valid is None else x[row, valid.int().argmax(1)]
        case "last":
            if valid is None:
                return x[:, -1]
            return x[row, length - 1 - valid.flip(1).int().argmax(1)]
        case "mean":
            return mean(x, valid)
        case "first_and_mean":
            return torch.cat([x[:, 0], x[:, spec.prefix :].mean(1)], -1)
        case "first_two":
            return x[:, :2]
    if ids is None:
        raise ValueError(f"this head pools by ids ({spec.pool}), and was given none: pass ids")
    wanted = ids if spec.pool == "largest" else ids.eq(spec.end or 0).int()
    if spec.pool == "end" and not bool(wanted.any(1).all()):
        raise ValueError(f"row {int(wanted.any(1).int().argmin())} has no end (id {spec.end}), where this head reads")
    at = wanted.argmax(1)
    return x[row, at]


def mean(x: Float[Tensor, "B T C"], valid: Bool[Tensor, "B T"] | None) -> Float[Tensor, "B C"]:
    """Of the valid tokens."""
    if valid is None:
        return x.mean(1)
    there = valid[..., None].to(x.dtype)
    return (x * there).sum(1) / there.sum(1).clamp(min=1)


class Heads(nn.ModuleDict):
    """A model's heads by name."""

    def __init__(self, width: int, specs: dict[str, HeadSpec], embedding: nn.Embedding | None = None) -> None:
        super().__init__({name: Head(width, spec, embedding) for name, spec in specs.items()})

    def find(self, name: str) -> Any:
        """A head, or a ValueError that names those that there are."""
        if name not in self:
            there = f"its heads are {', '.join(self)}" if len(self) else "it has no head"
            raise ValueError(f"this model has no '{name}' head ({there}): load one with it, or name a new one")
        return self[name]
