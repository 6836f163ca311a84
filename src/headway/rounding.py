"""Rounding: weights in 8 bits, W = H round(W H / s_w) s_w with a scale s_w a row, also while they are being read.

H mixes each 16 neighbouring channels (a Hadamard matrix, its own inverse), so that outlier channels are spread before
they are rounded, as in QuaRot (2404.00456), with nothing to calibrate.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

WORTH = 2**16  # weights from which a packed product beats the overhead of its call
MIX = 16  # channels that H mixes: SmolLM2's perplexity rises by 4.7, 0.8, 0.6% with 1, 16, 64; time grows with it
ROWS = 512  # rounded at a time: what lies between adds this much to the peak of memory, and stays in the cache
TINY = 1e-30  # a row or channel of zeros has this scale


class Rounded(nn.Parameter):
    """A weight (outputs, inputs) in whole numbers, filled a part at a time; it stands in for the parameter until
    `headway.quantize.prepare` packs it. `scales`: one an output, NaN until its row is there. dtype: the network's.

    Whole rows are rounded as they come. Columns wait in full precision until the last of them is there.
    """

    scales: Tensor
    mix: int
    kind: torch.dtype
    _waiting: Tensor | None
    _columns: int

    @classmethod
    def blank(cls, shape: tuple[int, ...], dtype: torch.dtype, mix: int) -> Rounded:
        """Nothing read yet; pages are taken when written."""
        made = cls(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        made.scales, made.mix, made.kind = torch.full(shape[:1], torch.nan), mix, dtype
        made._waiting, made._columns = None, 0
        return made

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, mix: int) -> Rounded:
        """What a weight becomes; itself, where it is rounded already."""
        if isinstance(weight, Rounded):
            if weight.mix != mix:
                raise ValueError(f"weights were rounded for mix={weight.mix} as they were read, not {mix}: read again")
            if weight._waiting is not None or bool(weight.scales.isnan().any()):
                raise ValueError("a weight came in parts and was not read whole: load it without quantize")
            return weight
        made = cls.blank(weight.shape, dtype, mix)
        made.data, made.scales = round_weight(weight, mix)
        return made

    @classmethod
    def beside(cls, *weights: Rounded) -> Rounded:
        """All their outputs, one after the other."""
        first = weights[0]
        made = cls.blank((sum(map(len, weights)), first.shape[1]), first.kind, first.mix)
        made.data, made.scales = torch.cat([w.data for w in weights]), torch.cat([w.scales for w in weights])
        return made

    def equals(self, rows: slice, values: Float[Tensor, "n K"]) -> bool:
        """Whether these rows are what the values become."""
        rounded, scales = round_weight(values.to(self.kind), self.mix)
        return torch.equal(self.data[rows], rounded) and torch.equal(self.scales[rows], scales)

    def receive(self, rows: slice, columns: slice, values: Float[Tensor, "n k"]) -> None:
        """Values of some whole rows, or of some columns of all rows of the slice."""
        values = values.to(self.kind)
        if values.shape[1] == self.shape[1]:
            self.data[rows], self.scales[rows] = round_weight(values, self.mix)
            return
        if self._waiting is None:
            self._waiting = torch.empty(self.shape, dtype=self.kind)
        self._waiting[rows, columns] = values
        self._columns += values.numel()
        if self._columns == self.numel():
            self.data, self.scales = round_weight(self._waiting, self.mix)
            self._waiting, self._columns = None, 0


def round_weight(weight: Float[Tensor, "N K"], mix: int = MIX) -> tuple[Int8[Tensor, "N K"], Float[Tensor, " N"]]:
    """W H in whole numbers from -127 to 127, and the scale of each output channel. Needs little memory beside."""
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    mixing = hadamard(weight.shape[1], mix)
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        rows = blockwise(weight.detach()[part].float(), mixing)
        scales[part] = torch.linalg.vector_norm(rows, torch.inf, 1).div_(127).clamp_min_(TINY)
        rounded[part] = (rows / scales[part, None]).round_()
    return rounded, scales


def hadamard(width: int, mix: int = MIX) -> Float[Tensor, "M M"]:
    """The symmetric Hadamard matrix over sqrt(M), which is its own inverse; M is the largest power of two in both."""
    size = min(width & -width, mix)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def blockwise(x: Float[Tensor, "*S K"], matrix: Float[Tensor, "M M"]) -> Float[Tensor, "*S K"]:
    """Multiplies each M neighbouring channels by the matrix."""
    return x if len(matrix) == 1 else torch.mm(x.reshape(-1, len(matrix)), matrix).view(x.shape)
