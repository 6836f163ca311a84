"""Patches: a picture as tokens (ViT, Dosovitskiy et al. 2021, arXiv:2010.11929).

tokens = [class, (distillation), (registers), W square + b] + positions: each square of p x p pixels is flattened and
mapped by one linear. That is what a convolution of stride p does, about as fast, and what serves a linear serves it.
The positions are one learned table over the named tokens and the grid; for a grid of another size that of the
squares is resized (bicubic), as DINOv2 does (2304.07193). Registers (2309.16588) stand nowhere and have none.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class Patches(nn.Module):
    """Pixels to tokens: one for each name in `prefix`, then `registers` more, then the squares row by row.

    `image`: (height, width) that the table of positions is for, in pixels; where `patch` does not divide it, the rest
    at the right and the bottom is left out, as the convolution leaves it. `interpolate`: take pictures of any other
    size that `patch` divides; `antialias`: smooth where the grid shrinks, as DINOv2 with registers does. `mask`: a
    token that stands for squares which are hidden (masked image modelling, 2106.08254). `positions`: without the table,
    nothing tells where a square stands.

    Parameters: `project.weight` (width, channels * patch * patch), a Conv2d's weight flattened (`flat`), and
    `project.bias`; `tokens.NAME.weight` (1, width); `registers.weight` (registers, width); `mask.weight` (1, width);
    `positions.weight` (prefix + grid, width).
    """

    def __init__(
        self,
        width: int,
        *,
        image: tuple[int, int],
        patch: int,
        channels: int = 3,
        prefix: tuple[str, ...] = ("class",),
        registers: int = 0,
        bias: bool = True,
        interpolate: bool = False,
        antialias: bool = False,
        mask: bool = False,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= patch <= min(image):
            raise ValueError(
                f"a patch of {patch} pixels does not fit into {image[0]} x {image[1]}: choose a smaller one"
            )
        if len(set(prefix)) < len(prefix):
            raise ValueError(f"prefix {prefix} names a token twice: give each a name of its own")
        self.image, self.patch, self.channels = image, patch, channels
        self.interpolate, self.antialias = interpolate, antialias
        self.project = nn.Linear(channels * patch * patch, width, bias)
        self.tokens = nn.ModuleDict({name: nn.Embedding(1, width) for name in prefix})
        self.registers = nn.Embedding(registers, width) if registers else None
        self.mask = nn.Embedding(1, width) if mask else None
        places = len(prefix) + self.grid[0] * self.grid[1]
        self.positions = nn.Embedding(places, width) if positions else None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of squares that the table of positions is for."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def prefix_count(self) -> int:
        """How many tokens stand before the squares, registers included."""
        return len(self.tokens) + (self.registers.num_embeddings if self.registers is not None else 0)

    def forward(
        self, pixels: Float[Tensor, "B c h w"], hidden: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """`hidden`: which squares the model does not see, row by row."""
        rows, columns = self._grid_of(pixels)
        squares = self.project(_squares(pixels.to(self.project.weight.dtype), rows, columns, self.patch))
        if hidden is not None:
            if self.mask is None:
                raise ValueError("no token stands for what is hidden here: make the patches with mask=True")
            squares = torch.where(hidden[..., None], self.mask.weight, squares)
        prefix: list[Tensor] = list(self.tokens.parameters())
        if self.positions is not None:
            named, over = self._positions(self.positions.weight, rows, columns)
            squares = squares + over
            prefix = [torch.cat(prefix) + named] if prefix else prefix
        if self.registers is not None:
            prefix.append(self.registers.weight)
        if not prefix:
            return squares
        return torch.cat([torch.cat(prefix).expand(len(pixels), -1, -1), squares], 1)

    def _grid_of(self, pixels: Float[Tensor, "B c h w"]) -> tuple[int, int]:
        channels, height, width = pixels.shape[1:]
        if channels != self.channels:
            raise ValueError(
                f"pixels of {channels} channels, and the patches are of {self.channels}: convert them before"
            )
        if (height, width) == self.image:
            return self.grid
        given, known, patch = f"{height} x {width}", f"{self.image[0]} x {self.image[1]}", self.patch
        if not self.interpolate:
            raise ValueError(f"{given} pixels, and the positions are for {known}: resize them, or set interpolate=True")
        if height % patch or width % patch or not height * width:
            raise ValueError(f"{given} pixels are no whole number of patches of {patch}: crop or resize them before")
        return height // patch, width // patch

    def _positions(
        self, weight: Float[Tensor, "S C"], rows: int, columns: int
    ) -> tuple[Float[Tensor, "P C"], Float[Tensor, "N C"]]:
        """Those of the named tokens, and those of a grid."""
        count = len(self.tokens)
        named, over = weight[:count], weight[count:]
        if (rows, columns) == self.grid:
            return named, over
        # in half precision the grid would shift; channels last, PyTorch 2.13 is wrong where one column is left
        table = over.T.unflatten(1, self.grid)[None].float().contiguous()
        table = F.interpolate(table, (rows, columns), mode="bicubic", align_corners=False, antialias=self.antialias)
        return named, table[0].flatten(1).T.to(over.dtype)


def flat(weight: Float[Tensor, "C c p p"]) -> Float[Tensor, "C K"]:
    """A patch convolution's weight as that of `Patches.project`: the same numbers in the same order."""
    return weight.flatten(1)


def unflat(weight: Float[Tensor, "C K"], patch: int) -> Float[Tensor, "C c p p"]:
    """The way back, to (width, channels, patch, patch)."""
    return weight.unflatten(1, (-1, patch, patch))


def _squares(pixels: Float[Tensor, "B c h w"], rows: int, columns: int, patch: int) -> Float[Tensor, "B N K"]:
    """Each square flattened: channels, then rows, then columns, as a convolution's weight has them."""
    whole = pixels[..., : rows * patch, : columns * patch]
    cut = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # (B, c, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
