"""Convolution: each token mixes with its neighbours through a kernel of fixed length, causal or centred.

Full width: y_t = W [x_{t-k+1} .. x_t] (ConvS2S, 1705.03122); depthwise: one kernel a channel, then a projection
(1901.10430), which may be as long as the sequence (2302.06646) and then goes through Fourier space; gated: half the
channels gate the other half (GLU, 1612.08083); dilated: 1803.01271; decaying: the window of Hyena (2302.10866).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.layers import Table, residual_output
from headway.mask import Mask
from headway.mixers import Cost, Implied, Mixer, without_padding
from headway.positions import Positions
from headway.spec import Size
from headway.state import Recurrent, State

LONGEST = 2**16  # tokens that a kernel may reach
SHORT = 32  # taps up to which a plain sum beats Fourier transforms, measured at 512 channels
FEW = 16  # new tokens of a stream up to which a sum over each one's window beats them


def reference(
    x: Float[Tensor, "B P C"], taps: Float[Tensor, "C K"], dilation: int = 1, zeros: tuple[int, int] = (0, 0)
) -> Float[Tensor, "B T C"]:
    """The definition: y_t = sum over i of taps_i x_{t + i dilation}, of x with so many `zeros` before and behind it,
    for all t whose window lies within. Fastest for few taps."""
    x = F.pad(x, (0, 0, *zeros))
    length = x.shape[1] - (taps.shape[1] - 1) * dilation
    each = taps.T.contiguous()
    y = each[0] * x[:, :length]
    for i in range(1, len(each)):
        y = y + each[i] * x[:, i * dilation : i * dilation + length]
    return y


def by_windows(
    x: Float[Tensor, "B P C"], taps: Float[Tensor, "C K"], dilation: int = 1, zeros: tuple[int, int] = (0, 0)
) -> Float[Tensor, "B T C"]:
    """The same, a window at a time; for few tokens, as in a stream."""
    x, reach = F.pad(x.mT, zeros), (taps.shape[1] - 1) * dilation
    windows = (x[..., t : t + reach + 1 : dilation] for t in range(x.shape[2] - reach))
    return torch.stack([(window * taps).sum(-1) for window in windows], 1)


def by_fourier(
    x: Float[Tensor, "B P C"], taps: Float[Tensor, "C K"], dilation: int = 1, zeros: tuple[int, int] = (0, 0)
) -> Float[Tensor, "B T C"]:
    """The same as a product in Fourier space, in fp32 at the least; for many taps.

    It takes some 2.5 N log2(N) operations a channel, and twice that a channel and row, which `cost` leaves out (they
    are no matrix products). N is at least P + max(zeros), so that what wraps around the end meets zeros alone.
    """
    size, length = _transform_size(x.shape[1], zeros), x.shape[1] + sum(zeros) - (taps.shape[1] - 1) * dilation
    wide = torch.promote_types(x.dtype, torch.float32)
    places = (torch.arange(taps.shape[1], device=x.device) * dilation - zeros[0]) % size
    with torch.autocast(x.device.type, enabled=False):
        spread = taps.new_zeros(len(taps), size, dtype=wide).index_copy(1, places, taps.to(wide))
        product = torch.fft.rfft(x.mT.to(wide), size) * torch.fft.rfft(spread).conj()
        return torch.fft.irfft(product, size)[..., :length].mT.to(x.dtype)


def _transform_size(tokens: int, zeros: tuple[int, int]) -> int:
    """A power of two, for which transforms are fastest."""
    return 1 << (tokens + max(zeros) - 1).bit_length()


class Conv(Mixer):
    """A convolution over the tokens.

    kernel: tokens it spans; as many as the sequence has where depthwise, or twice that to reach all of it both ways.
    dilation: steps between them. depthwise: one kernel a channel and a projection behind it. gated: twice the channels,
    one half gating the other. decay: the taps of a channel fade with distance, e-fold in 2 tokens in the first channel
    and in all the kernel in the last; long kernels start better so. Under a causal mask the kernel ends at the token
    itself, else it is centred. A stream keeps the (kernel - 1) * dilation tokens before.
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
        decay: bool = False,
    ) -> None:
        super().__init__()
        if (kernel - 1) * dilation > LONGEST:  # no weight's shape tells it
            raise ValueError(f"conv: kernel {kernel}, dilation {dilation}: reaches over {LONGEST} tokens")
        if decay and not depthwise:
            raise ValueError("conv: decay fades the kernel of each channel: set depthwise=True, or leave decay out")
        self.width, self.kernel, self.dilation = width, kernel, dilation
        self.depthwise, self.gated, self.decay = depthwise, gated, decay
        inner = width * (2 if gated else 1)
        if depthwise:
            self.taps = Table(kernel, width)  # row c is the kernel of channel c
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
        length, left = x.shape[1], self.reach if mask.causal else self.reach // 2
        zeros = (left, self.reach - left)
        if state is not None:
            x, zeros = self._joined(x, mask, state), (0, 0)
        h = self.mix(self._channels(x, length, left, zeros) if self.depthwise else self._windows(x, length, zeros))
        if self.gated:
            h, gate = h.chunk(2, -1)
            h = h * gate.sigmoid()
        else:
            h = F.gelu(h)
        return self.out(h)

    def implied(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        context: Float[Tensor, "B S C"] | None = None,
        rows: slice | None = None,
    ) -> Implied:
        """Its Toeplitz matrix, in sizes: the Frobenius norm of what a token's channels are multiplied by on their way
        to another's, before the gate. Where depthwise, that is the norm over the channels' own taps."""
        self.require(mask, context=context)
        length, left = x.shape[1], self.reach if mask.causal else self.reach // 2
        if self.depthwise:
            sizes = (self.taps.weight * self._window(left) if self.decay else self.taps.weight).norm(dim=0)
        else:
            sizes = self.mix.weight.unflatten(1, (self.kernel, self.width)).norm(dim=(0, 2))
        index = torch.arange(length, device=x.device)
        ahead = index - index[rows or slice(None), None] + left
        met = (ahead >= 0) & (ahead <= self.reach) & (ahead % self.dilation == 0)
        found = sizes[(ahead // self.dilation).clamp(0, self.kernel - 1)].masked_fill(~met, 0.0)
        return Implied(without_padding(found.expand(len(x), 1, -1, -1), mask, context, rows))

    def _joined(self, x: Tensor, mask: Mask, state: State) -> Float[Tensor, "B P C"]:
        """The tokens behind those that the stream remembers, which are kept in the order that a kernel's taps are."""
        if not mask.causal:
            raise ValueError("conv streams only under a causal mask: a centred kernel needs tokens yet to come")
        if not isinstance(state, Recurrent):
            raise ValueError(f"conv streams with a Recurrent state, not {type(state).__name__}: use init_state")
        joined = torch.cat([state.tensors[0].to(x.dtype), x.mT], 2)
        state.tensors = (joined[..., joined.shape[2] - self.reach :].clone(),)  # a view would hold all of a prompt
        return joined.mT

    def _windows(self, x: Tensor, length: int, zeros: tuple[int, int]) -> Float[Tensor, "B T W"]:
        """The k tokens that each token reads, side by side."""
        x = F.pad(x, (0, 0, *zeros))
        shifted = [x[:, i * self.dilation : i * self.dilation + length] for i in range(self.kernel)]
        return torch.cat(shifted, -1) if self.kernel > 1 else shifted[0]

    def _channels(self, x: Tensor, length: int, left: int, zeros: tuple[int, int]) -> Float[Tensor, "B T C"]:
        """Each channel summed with its own taps, the fastest way."""
        taps = self.taps.weight * self._window(left) if self.decay else self.taps.weight
        before, behind, zeros = self._unmet(length, zeros)
        taps = taps[:, before : self.kernel - behind]
        many = by_windows if length <= FEW else by_fourier
        way = reference if self.kernel <= SHORT else many  # by the kernel, so that both directions cost the same
        return self.taps.bias + way(x, taps, self.dilation, zeros)

    def _unmet(self, length: int, zeros: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        """Taps on either side that meet nothing but zeros, and the zeros that are needed without them."""
        before, behind = (max(side - length + 1, 0) // self.dilation for side in zeros)
        return before, behind, (zeros[0] - before * self.dilation, zeros[1] - behind * self.dilation)

    def _window(self, left: int) -> Float[Tensor, "C K"]:
        """exp(-distance / span), the distance in taps, of the same energy in each channel; `left` as in zeros."""
        like = self.taps.weight
        share = torch.linspace(0, 1, self.width, device=like.device)[:, None]
        span = 2 * max(self.kernel / 2, 1) ** share
        distance = (torch.arange(self.kernel, device=like.device) - left / self.dilation).abs()
        window = torch.exp(-(distance / span).clamp(max=30))  # smaller numbers are denormal, and slow
        return (window * (self.kernel / window.square().sum(1, keepdim=True)).sqrt()).to(like.dtype)

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        return Recurrent(self.mix.weight.new_zeros(batch, self.width, self.reach))

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        inputs = self.width * (1 if self.depthwise else self.kernel)
        inner = self.width * (2 if self.gated else 1)
        return Cost(
            flops=2 * length * (inputs * inner + self.width**2),
            state_bytes=4 * self.reach * self.width,
            activation_bytes=4
            * (self._kept(length) + length * (inputs + inner + self.width * (2 if self.gated else 1))),
        )

    def _kept(self, length: int) -> int:
        """Numbers that the causal depthwise sum keeps for the way back: tokens and taps, or their transforms."""
        if not self.depthwise:
            return 0
        before, _, zeros = self._unmet(length, (self.reach, 0))
        met = self.kernel - before
        faded = self.width * (self.kernel + met) if self.decay else 0
        if self.kernel <= SHORT or length <= FEW:
            return self.width * (length + zeros[0] + met) + faded
        return 2 * self.width * (_transform_size(length, zeros) + 2) + faded
