"""State: what one mixer remembers between calls, so that a stream costs one token at a time.

A mixer makes its own (`init_state`); a model holds them in a plain list. Each can `reorder` its rows (beams, rows
that are done), `rewind` to an earlier length where it still can (speculation), and tell its `nbytes`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class State(Protocol):
    """The contract of every state."""

    @property
    def nbytes(self) -> int:
        """Bytes that the remembered tensors hold."""
        ...

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        """Row i becomes what row `rows[i]` was; rows may repeat, and may be left out."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, or raise a ValueError where the past is not kept."""
        ...


class KeyValue:
    """Keys and values of all tokens so far, in slots that grow by doubling. Unfilled and padded slots stand at -1."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(capacity, 1)
        self.length = 0
        self.padded = False  # known on the Python side, so that no mask is made where none is needed
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.pos: Tensor | None = None

    def append(
        self, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T E"], pos: Int[Tensor, "B T"], padded: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Remembers the new tokens and returns keys, values and positions of all of them."""
        end = self.length + k.shape[2]
        if self.k is None:
            self.capacity = max(self.capacity, end)
            self.k, self.v = _slots(k, self.capacity), _slots(v, self.capacity)
            self.pos = pos.new_full((pos.shape[0], self.capacity), -1)
        assert self.k is not None and self.v is not None and self.pos is not None
        self.reserve(k.shape[2])
        at, new = self.length, k.shape[2]
        self.k.narrow(2, at, new).copy_(k)  # in a step of decoding, indexing costs more than copying
        self.v.narrow(2, at, new).copy_(v)
        self.pos.narrow(1, at, new).copy_(pos)
        self.length, self.padded = end, self.padded or padded
        return self.k.narrow(2, 0, end), self.v.narrow(2, 0, end), self.pos.narrow(1, 0, end)

    def reserve(self, count: int) -> None:
        """Makes room for so many more tokens, where any have come before."""
        if self.length + count > self.capacity:
            self._grow(max(self.length + count, 2 * self.capacity))

    def _grow(self, capacity: int) -> None:
        assert self.k is not None and self.v is not None and self.pos is not None
        extra = capacity - self.capacity
        self.k = torch.cat([self.k, _slots(self.k, extra)], 2)
        self.v = torch.cat([self.v, _slots(self.v, extra)], 2)
        self.pos = torch.cat([self.pos, self.pos.new_full((self.pos.shape[0], extra), -1)], 1)
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return _bytes(self.k, self.v, self.pos)

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        if self.k is not None and self.v is not None and self.pos is not None:
            self.k, self.v, self.pos = self.k[rows], self.v[rows], self.pos[rows]

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} tokens: only {self.length} are remembered")
        if self.pos is not None:
            self.pos[:, length:] = -1
        self.length = length


class Ring:
    """Keys and values of the last `window` tokens and of the first `sinks`: constant memory for an endless stream."""

    def __init__(self, window: int, sinks: int = 0) -> None:
        self.window, self.sinks = window, sinks
        self.length = 0
        self.padded = False
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.pos: Tensor | None = None

    def append(
        self, k: Float[Tensor, "B G T D"], v: Float[Tensor, "B G T E"], pos: Int[Tensor, "B T"], padded: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is remembered and the new tokens behind it; then keeps the sinks and the last `window`."""
        self.length += pos.shape[1]
        if self.k is not None and self.v is not None and self.pos is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            pos = torch.cat([self.pos, pos], 1)
        start = max(pos.shape[1] - self.window, 0)
        sinks = self._sinks(pos[:, :start])
        self.k, self.v = _keep(k, sinks, start), _keep(v, sinks, start)
        self.pos = torch.cat([pos.gather(1, sinks), pos[:, start:]], 1)
        self.padded = self.padded or padded
        return k, v, pos

    def _sinks(self, pos: Tensor) -> Tensor:
        """The slots of the sinks. They are told by position, because padding on the left moves them in each row."""
        ordinary = (pos < 0) | (pos >= self.sinks)
        return ordinary.int().argsort(dim=1, stable=True)[:, : self.sinks]

    @property
    def nbytes(self) -> int:
        return _bytes(self.k, self.v, self.pos)

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        if self.k is not None and self.v is not None and self.pos is not None:
            self.k, self.v, self.pos = self.k[rows], self.v[rows], self.pos[rows]

    def rewind(self, length: int) -> None:
        raise ValueError("a ring keeps only its window and cannot rewind: stream again from the start")


class Cross:
    """Keys and values of a context that does not change: written at the first call, read ever after."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return _bytes(*self.kept)

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        self.kept = tuple(tensor[rows] for tensor in self.kept)

    def rewind(self, length: int) -> None:
        """A context has no past of its own."""


class Prefixed:
    """Learned keys and values that attention sees before all others (prefix tuning, 2101.00190), at positions 0, 1, ...

    It is given in the place of a state, and stands around the one that there is, if any.
    """

    def __init__(self, k: Float[Tensor, "G n D"], v: Float[Tensor, "G n D"], state: State | None = None) -> None:
        self.k, self.v, self.state = k, v, state

    def before(self, k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S D"]) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer."""
        whole = [torch.cat([own.to(t.dtype).expand(len(t), -1, -1, -1), t], 2) for own, t in ((self.k, k), (self.v, v))]
        return whole[0], whole[1]

    def positions(self, pos: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """Where all of them stand, the tokens at `pos`."""
        return torch.cat([torch.arange(self.k.shape[1], device=pos.device).expand(len(pos), -1), pos], 1)

    @property
    def nbytes(self) -> int:
        return _bytes(self.k, self.v) + (0 if self.state is None else self.state.nbytes)

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        if self.state is not None:  # the prefix is the same for all rows
            self.state.reorder(rows)

    def rewind(self, length: int) -> None:
        if self.state is not None:
            self.state.rewind(length)


class Recurrent:
    """A few tensors of fixed size that sum up all of the past."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    @property
    def nbytes(self) -> int:
        return _bytes(*self.tensors)

    def reorder(self, rows: Int[Tensor, " R"]) -> None:
        self.tensors = tuple(tensor[rows] for tensor in self.tensors)

    def rewind(self, length: int) -> None:
        raise ValueError("a recurrent state sums up its past and cannot rewind: stream again from the start")


def _slots(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(like.shape[0], like.shape[1], count, like.shape[3])


def _keep(t: Tensor, slots: Tensor, start: int) -> Tensor:
    """Each row's `slots`, then all slots from `start`."""
    index = slots[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
    return torch.cat([t.gather(2, index), t[:, :, start:]], 2)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
