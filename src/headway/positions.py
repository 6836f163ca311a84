"""Positions: how a model learns where a token stands.

`pos: Int[B T]` always travels with the tokens. A scheme has three hooks and overrides those it needs: `embed(x, pos)`
on the embeddings, `rotate(x, pos)` on queries and keys, `bias(q_pos, k_pos)` on the scores. No scheme ever sees a
length or an offset, so that decoding step by step and prefill agree by construction. Padding stands at -1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.spec import PositionSpec, RotaryScaling


class Positions(nn.Module):
    """The scheme that does nothing, and the three hooks of all others."""

    @property
    def inside(self) -> Positions:
        """What the mixers need of it. A scheme that only embeds gives them none, so that its table is saved once."""
        return self

    @property
    def biases(self) -> bool:
        """Whether it adds to the scores."""
        return type(self).bias is not Positions.bias

    def embed(self, x: Float[Tensor, "B T C"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        return x

    def rotate(self, x: Float[Tensor, "B H T D"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
        return x

    def bias(
        self, heads: int, q_pos: Int[Tensor, "B T"], k_pos: Int[Tensor, "B S"]
    ) -> Float[Tensor, "#B H T S"] | None:
        return None


class Learned(Positions):
    """One vector a position (1706.03762, section 3.5); `offset` rows stand before that of position 0, unused."""

    def __init__(self, width: int, length: int, offset: int = 0) -> None:
        super().__init__()
        self.length, self.offset = length, offset
        self.table = nn.Embedding(length + offset, width)

    @property
    def inside(self) -> Positions:
        return Positions()

    def embed(self, x: Float[Tensor, "B T C"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        tokens, length = x.shape[1], self.length
        if tokens > length:  # packed sequences may be longer together than one may be
            tokens = int(pos.max()) + 1
        try:
            if tokens <= length:
                return x + self.table(pos.clamp(min=0) + self.offset if self.offset else pos.clamp(min=0))
        except IndexError:  # a stream is past the end; asking beforehand would stall a GPU
            tokens = int(pos.max()) + 1
        raise ValueError(
            f"{tokens} tokens, and the learned positions end at {length}: "
            "shorten the input or train with a larger positions.length"
        )


class Sinusoidal(Positions):
    """sin and cos of pos / base^(2i/C), in two halves (1706.03762)."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.register_buffer("rates", _rates(width, base), persistent=False)
        self.rates: Tensor

    def embed(self, x: Float[Tensor, "B T C"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        angles = pos[..., None].float() * self.rates
        return x + torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)


class Rotary(Positions):
    """Rotates each pair (x_i, x_{i+D/2}) of a query or key by pos * base^(-2i/D) (2104.09864)."""

    def __init__(self, head_dim: int, base: float, scaling: RotaryScaling | None = None) -> None:
        super().__init__()
        self.register_buffer("rates", _scaled(_rates(head_dim, base), scaling), persistent=False)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self.rates: Tensor

    def rotate(self, x: Float[Tensor, "B H T D"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
        cos, sin = self._turns(pos, x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _turns(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle; kept, because all layers of a call ask with the very same positions."""
        if self._kept is None or self._kept[0] is not pos or self._kept[1].dtype != dtype:
            angles = pos[:, None, :, None].float() * self.rates
            self._kept = (pos, angles.cos().to(dtype), angles.sin().to(dtype))
        return self._kept[1:]


class Alibi(Positions):
    """A penalty on the score that grows with distance, one slope a head: -2^(-8h/H) |q - k| (2108.12409)."""

    def bias(self, heads: int, q_pos: Int[Tensor, "B T"], k_pos: Int[Tensor, "B S"]) -> Float[Tensor, "B H T S"]:
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=q_pos.device) / heads)
        distance = (q_pos[:, None, :, None] - k_pos[:, None, None, :]).abs()
        return -slopes[:, None, None] * distance


class Buckets(Positions):
    """A learned bias a head for each bucket of distances, the far ones wide (1910.10683, section 2.1).

    One table serves all layers of a stack, so the layers borrow the scheme and do not hold it.
    """

    def __init__(self, heads: int, buckets: int, distance: int, both: bool) -> None:
        super().__init__()
        self.buckets, self.distance, self.both = buckets, distance, both
        self.table = nn.Embedding(buckets, heads)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def inside(self) -> Positions:
        return Borrowed(self)

    def bias(self, heads: int, q_pos: Int[Tensor, "B T"], k_pos: Int[Tensor, "B S"]) -> Float[Tensor, "#B H T S"]:
        if heads != self.table.embedding_dim:
            raise ValueError(f"buckets: a bias for {self.table.embedding_dim} heads, and this layer has {heads}")
        kept = self._kept
        if kept is None or kept[0] is not q_pos or kept[1] is not k_pos:  # the layers of a call ask alike
            one = q_pos.stride(0) == k_pos.stride(0) == 0  # rows that are one row expanded share a bias
            q, k = (q_pos[:1], k_pos[:1]) if one else (q_pos, k_pos)
            kept = self._kept = (q_pos, k_pos, self._bucket(k[:, None, :] - q[:, :, None]))
        by_head = self.table.weight.T.contiguous()  # so that each head's bias is a matrix, as kernels read it
        return by_head.index_select(1, kept[2].flatten()).unflatten(1, kept[2].shape).transpose(0, 1)

    def _bucket(self, step: Int[Tensor, "B T S"]) -> Int[Tensor, "B T S"]:
        """Half of the buckets hold one distance each, the other half grow by a constant factor up to `distance`."""
        count, first = self.buckets, torch.zeros_like(step)
        if self.both:
            count //= 2
            first = (step > 0) * count
        away = step.abs() if self.both else (-step).clamp(min=0)
        exact = count // 2
        grown = torch.log(away.clamp(min=1).float() / exact) / math.log(self.distance / exact) * (count - exact)
        return first + torch.where(away < exact, away, (exact + grown.long()).clamp(max=count - 1))


class Borrowed(Positions):
    """A scheme that belongs to somebody else: its parameters are saved and trained there, once."""

    def __init__(self, owner: Positions) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, a module is nobody's child

    @property
    def biases(self) -> bool:
        return self._owner[0].biases

    def rotate(self, x: Float[Tensor, "B H T D"], pos: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
        return self._owner[0].rotate(x, pos)

    def bias(
        self, heads: int, q_pos: Int[Tensor, "B T"], k_pos: Int[Tensor, "B S"]
    ) -> Float[Tensor, "#B H T S"] | None:
        return self._owner[0].bias(heads, q_pos, k_pos)


def build_positions(spec: PositionSpec, width: int, head_dim: int | None, heads: int | None = None) -> Positions:
    """The scheme a stack's spec asks for; `head_dim` and `heads` are those of its attention mixers, None without."""
    match spec.name:
        case "none":
            return Positions()
        case "learned":
            return Learned(width, spec.length, spec.offset)
        case "sinusoidal":
            if width % 2:
                raise ValueError(f"sinusoidal positions come in pairs, and width is {width}: choose an even one")
            return Sinusoidal(width, spec.base)
        case "alibi":
            if head_dim is None:
                raise ValueError("alibi is a penalty on the scores of heads, and this stack has none: choose another")
            return Alibi()
        case "buckets":
            if heads is None:
                raise ValueError("buckets are a bias on the scores of heads, and this stack has none: choose another")
            return Buckets(heads, spec.buckets, spec.distance, spec.both)
        case "rotary":
            if head_dim is None:
                return Positions()
            if head_dim % 2:
                raise ValueError(f"rotary positions turn pairs, and head_dim is {head_dim}: choose an even one")
            return Rotary(head_dim, spec.base, spec.scaling)


def positions_of(valid: Tensor | None, rows: int, length: int, device: torch.device) -> Int[Tensor, "B T"]:
    """0, 1, 2, ... over the tokens that are there, -1 at padding, whichever side it stands on."""
    if valid is None:
        return torch.arange(length, device=device).expand(rows, length)
    return torch.where(valid, valid.cumsum(1) - 1, -1)


def _rates(width: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2).float() / width)  # by exp and log, ten times less exact in fp32


def _scaled(rates: Tensor, scaling: RotaryScaling | None) -> Tensor:
    if scaling is None:
        return rates
    if scaling.name == "linear":
        return rates / scaling.factor
    turns = scaling.trained * rates / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)  # 1: as it was, 0: slowed by the factor
    return kept * rates + (1 - kept) * rates / scaling.factor
