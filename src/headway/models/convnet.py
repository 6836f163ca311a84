"""ConvNet: each pixel sees its neighbours, near before far, whatever stands where (LeCun 1998; ResNet, 1512.03385).

x + W2 act(W1 norm(x)), W1 and W2 over squares of `kernel` x `kernel`; between stages four pixels become one, of twice
the width. A convolution is the linear map of each square, as patches are: what trains or rounds a linear does so here.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from headway.heads import Heads, HeadSpec
from headway.layers import Dropout, activate, norm, residual_output
from headway.spec import Activation, Norm, Size, Strict

PICTURES = True


class Spec(Strict, frozen=True):
    """`image`: (height, width) in pixels; `depths`: blocks of each stage; `width`: of the first, doubled by each
    next."""

    width: Size
    image: tuple[Size, Size]
    depths: Annotated[tuple[Annotated[int, Meta(ge=1, le=1024)], ...], Meta(min_length=1, max_length=16)]
    channels: Size = 3
    kernel: Annotated[int, Meta(ge=1, le=63)] = 3
    activation: Activation = "gelu"
    norm: Norm = "layer"
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    heads: dict[str, HeadSpec] = {}

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise ValueError(f"a kernel has a middle, and {self.kernel} is even: choose an odd one")
        smallest = min(self.image) >> (len(self.depths) - 1)
        if smallest < 1:
            raise ValueError(f"{len(self.depths)} stages halve {min(self.image)} pixels to none: have fewer")


class Convolution(nn.Module):
    """The linear map of the square around each pixel, zeros beyond the edge."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.map, self.kernel = nn.Linear(inputs * kernel * kernel, outputs), kernel

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O H W"]:
        squares = F.unfold(x, self.kernel, padding=self.kernel // 2)  # B C*k*k H*W
        return self.map(squares.mT).mT.unflatten(2, x.shape[2:])


class Block(nn.Module):
    """x + leave(activation(enter(norm(x))))."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.norm, self.activation = norm(spec.norm, width), spec.activation
        self.enter = Convolution(width, width, spec.kernel)
        self.leave = Convolution(width, width, spec.kernel)
        residual_output(self.leave.map)
        self.dropout = Dropout(spec.dropout)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.dropout(self.leave(activate(self.enter(normed), self.activation)))


class Model(nn.Module):
    """Stages, norm, heads. `forward` gives the last stage's pixels as tokens; `head` what a head makes of them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        widths = [spec.width << i for i in range(len(spec.depths))]
        self.image, self.channels = spec.image, spec.channels
        self.begin = nn.ModuleList(
            Convolution(before, width, spec.kernel)
            for before, width in zip([spec.channels, *widths], widths, strict=False)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(width, spec) for _ in range(depth)))
            for width, depth in zip(widths, spec.depths, strict=True)
        )
        self.norm = norm(spec.norm, widths[-1])
        self.heads = Heads(widths[-1], spec.heads)
        self.branches = sum(spec.depths)

    def forward(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        """`pixels` are scaled as for any other model of pictures."""
        if tuple(pixels.shape[1:]) != (self.channels, *self.image):
            wanted = " x ".join(map(str, (self.channels, *self.image)))
            raise ValueError(f"pixels of {' x '.join(map(str, pixels.shape[1:]))}, and this model reads {wanted}")
        x = pixels
        for i, (begin, blocks) in enumerate(zip(self.begin, self.blocks, strict=True)):
            x = blocks(begin(x if i == 0 else F.avg_pool2d(x, 2)))
        return self.norm(x.flatten(2).mT)

    def head(self, name: str, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B *T O"]:
        """What the head `name` makes of hidden states."""
        return self.heads.find(name)(x)
