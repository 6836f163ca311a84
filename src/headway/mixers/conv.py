"""Convolution: each token mixes with its neighbours through a kernel of fixed length, causal or centred.

Full width: y_t = W [x_{t-k+1} .. x_t] (ConvS2S, 1705.03122); depthwise: one kernel a channel, then a projection
(1901.10430); gated: half the channels gate the other half (GLU, 1612.08083); dilated: 1803.01271.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.layers import residual_output
from headway.mask import Mask
from headway.mixers import Cost, Mixer
from headway.positions import Positions
from headway.spec import Size
from headway.state import Recurrent, State

LONGEST = 2**16  # tokens that a kernel may reach


class Conv(Mixer):
    """A convolution over the tokens.

    kernel: tokens it spans. dilation: steps between them. depthwise: one kernel a channel and a projection behind it.
    gated: twice the channels, one half gating the other. Under a causal mask the kernel ends at the token itself.
    """

    CAN: ClassVar = frozenset({"causal", "bidirectional", "padding", "stream"})

    def __init__(
        self,
        width: int,
        *,
        positions: Positions | None = None,
        kernel: Size = 3,
        dilation: Size = 1,
        depthwise: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if (kernel - 1) * dilation > LONGEST:  # no weight's shape tells it
            raise ValueError(f"conv: kernel {kernel}, dilation {dilation}: reaches over {LONGEST} tokens")
        self.width, self.kernel, self.dilation, self.depthwise, self.gated = width, kernel, dilation, depthwise, gated
        inner = width * (2 if gated else 1)
        if depthwise:
            self.taps = nn.Linear(kernel, width)  # row c is the kernel of channel c
            self.mix = nn.Linear(width, inner)
        else:
            self.mix = nn.Linear(kernel * width, inner)
        self.out = residual_output(nn.Linear(width, width))

    @property
    def reach(self) -> int:
        """Tokens to the left that the causal kernel needs."""
        return (self.kernel - 1) * self.dilation

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
        if mask.valid is not None:
            x = x.masked_fill(~mask.valid[..., None], 0.0)
        h = self.mix(self._windows(self._padded(x, mask, state), x.shape[1]))
        if self.gated:
            h, gate = h.chunk(2, -1)
            h = h * gate.sigmoid()
        else:
            h = F.gelu(h)
        return self.out(h)

    def _padded(self, x: Tensor, mask: Mask, state: State | None) -> Tensor:
        """The tokens with what the kernel needs around them: zeros, or what the stream remembers."""
        if state is not None:
            if not mask.causal:
                raise ValueError("conv streams only under a causal mask: a centred kernel needs tokens yet to come")
            if not isinstance(state, Recurrent):
                raise ValueError(f"conv streams with a Recurrent state, not {type(state).__name__}: use init_state")
            x = torch.cat([state.tensors[0].to(x.dtype), x], 1)
            state.tensors = (x[:, x.shape[1] - self.reach :],)
            return x
        left = self.reach if mask.causal else self.reach // 2
        return F.pad(x, (0, 0, left, self.reach - left))

    def _windows(self, x: Tensor, length: int) -> Tensor:
        """What the projection reads at each token: the k tokens side by side, or summed with each channel's taps."""
        shifted = [x[:, i * self.dilation : i * self.dilation + length] for i in range(self.kernel)]
        if not self.depthwise:
            return torch.cat(shifted, -1) if self.kernel > 1 else shifted[0]
        return self.taps.bias + sum(self.taps.weight[:, i] * tokens for i, tokens in enumerate(shifted))

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        return Recurrent(self.mix.weight.new_zeros(batch, self.reach, self.width))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        inputs = self.width * (1 if self.depthwise else self.kernel)
        inner = self.width * (2 if self.gated else 1)
        read = 2 * self.width if self.depthwise else inputs  # the tokens and their sums, or the windows side by side
        return Cost(
            flops=2 * length * (inputs * inner + self.width**2),
            state_bytes=4 * self.reach * self.width,
            activation_bytes=4 * length * (read + inner + self.width * (2 if self.gated else 1)),
        )
