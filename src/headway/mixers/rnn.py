"""RNN: LSTM or GRU over the tokens, one after the other; both directions where nothing is causal.

h_t = cell(x_t, h_{t-1}), y = W_o [h forward; h backward]. LSTM: Hochreiter & Schmidhuber 1997; GRU: 1406.1078.
Rows are shifted together before the fast kernel, so that padding on either side changes nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Mixer
from headway.positions import Positions
from headway.spec import Size
from headway.state import Recurrent, State


class Rnn(Mixer):
    """A recurrent layer.

    cell: lstm or gru. hidden: cells a direction (default: width). bidirectional: also from the end.
    """

    CAN: ClassVar = frozenset({"causal", "bidirectional", "padding", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden: Size | None = None,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.hidden, self.cell = width, hidden or width, cell
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.ahead = kind(width, self.hidden, batch_first=True)
        self.back = kind(width, self.hidden, batch_first=True) if bidirectional else None
        self.out = residual_output(nn.Linear(self.hidden * (2 if bidirectional else 1), width))

    @property
    def can(self) -> frozenset[str]:
        return self.CAN - ({"bidirectional"} if self.back is None else {"causal", "stream"})

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        self.require(mask, state, context)
        if state is not None:
            return self.out(self._stream(x, mask, state))
        if mask.valid is None:
            return self.out(self._whole(x))
        return self.out(self._padded(x, mask.valid))

    def _whole(self, x: Tensor) -> Tensor:
        """Hidden states of an unpadded batch, forward beside backward."""
        ahead = self.ahead(x)[0]
        return ahead if self.back is None else torch.cat([ahead, self.back(x.flip(1))[0].flip(1)], -1)

    def _padded(self, x: Tensor, valid: Tensor) -> Tensor:
        """Shifts the tokens of each row to the front, and for the way back reverses just them; then undoes it."""
        x = x.masked_fill(~valid[..., None], 0.0)
        front = valid.int().argsort(dim=1, descending=True, stable=True)  # tokens first, in order
        places = front.argsort(dim=1)
        ahead = _take(self.ahead(_take(x, front))[0], places)
        if self.back is None:
            return ahead
        count = valid.sum(1, keepdim=True)
        index = torch.arange(x.shape[1], device=x.device)[None]
        turned = torch.where(index < count, count - 1 - index, index)  # its own inverse
        back = _take(self.back(_take(_take(x, front), turned))[0], turned)
        return torch.cat([ahead, _take(back, places)], -1)

    def _stream(self, x: Tensor, mask: Mask, state: State) -> Tensor:
        if not isinstance(state, Recurrent):
            raise ValueError(f"rnn streams with a Recurrent state, not {type(state).__name__}: use init_state")
        if mask.valid is None:
            y, kept = self.ahead(x, self._pack(state.tensors))
            state.tensors = self._unpack(kept)
            return y
        outputs = []  # padding must not touch the state, so each step keeps the old one where there is no token
        for t in range(x.shape[1]):
            there = mask.valid[:, t, None]
            step, kept = self.ahead(x[:, t : t + 1].masked_fill(~there[..., None], 0.0), self._pack(state.tensors))
            state.tensors = tuple(
                torch.where(there, new, old) for new, old in zip(self._unpack(kept), state.tensors, strict=True)
            )
            outputs.append(step)
        return torch.cat(outputs, 1)

    def _pack(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | Tensor:
        """Rows come first in a state; PyTorch wants layers first."""
        layered = [tensor[None].contiguous() for tensor in tensors]
        return (layered[0], layered[1]) if self.cell == "lstm" else layered[0]

    def _unpack(self, kept: tuple[Tensor, Tensor] | Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in kept) if isinstance(kept, tuple) else (kept[0],)

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        if self.back is not None:
            raise ValueError("rnn: the way back starts at the end, so it cannot stream: set bidirectional=False")
        like = self.out.weight
        return Recurrent(*(like.new_zeros(batch, self.hidden) for _ in range(2 if self.cell == "lstm" else 1)))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        gates, kept = (4, 2) if self.cell == "lstm" else (3, 1)
        ways = 1 if self.back is None else 2
        cells = 2 * gates * self.hidden * (self.width + self.hidden)
        out = 2 * ways * self.hidden * self.width
        kept_a_token = ways * (8 * self.hidden + self.width)  # the gates, the cell and its tanh; the input
        return Cost(
            flops=length * (ways * cells + out),
            state_bytes=4 * kept * self.hidden if self.back is None else 0,
            activation_bytes=4 * length * kept_a_token,
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
