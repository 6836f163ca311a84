"""Vision: a picture's patches are its tokens, and every one sees every other one (ViT, 2010.11929)."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from msgspec import Meta
from torch import Tensor, nn

from headway.attend import FULL
from headway.block import Stack
from headway.heads import Heads, HeadSpec
from headway.patches import Patches
from headway.spec import Size, StackSpec, Strict

PICTURES = True


class PatchSpec(Strict, frozen=True):
    """`image`: (height, width) in pixels that the positions were made for; `prefix`: learned tokens before the patches
    ("class", "distillation"); `registers`: further ones without a position (2309.16588). `interpolate`: pictures of
    other sizes are read too, the positions stretched to them, smoothly where `antialias` says so. `mask`: a token for
    patches that are hidden. `positions`: without them the model cannot tell where a patch stands."""

    image: tuple[Size, Size]
    patch: Size
    channels: Size = 3
    prefix: tuple[str, ...] = ("class",)
    registers: Annotated[int, Meta(ge=0, le=1024)] = 0
    bias: bool = True
    interpolate: bool = False
    antialias: bool = False
    mask: bool = False
    positions: bool = True


class Spec(Strict, frozen=True):
    """Where a picture's patches stand is learned with them, so the stack's positions are usually "none"."""

    width: Size
    patches: PatchSpec
    stack: StackSpec
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    heads: dict[str, HeadSpec] = {}


class Model(nn.Module):
    """Patches, stack, heads. `forward` gives the hidden states, prefix first; `head` what a head makes of them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        p = spec.patches
        self.patches = Patches(
            spec.width,
            image=p.image,
            patch=p.patch,
            channels=p.channels,
            prefix=p.prefix,
            registers=p.registers,
            bias=p.bias,
            interpolate=p.interpolate,
            antialias=p.antialias,
            mask=p.mask,
            positions=p.positions,
        )
        self.stack = Stack(spec.stack, spec.width, spec.dropout)
        self.heads = Heads(spec.width, spec.heads)
        self.branches = self.stack.branches

    def forward(
        self, pixels: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """`pixels` are scaled as the checkpoint's processor says; `hidden` patches are not seen."""
        x = self.patches(pixels, hidden)
        pos = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return self.stack(x, mask=FULL, pos=pos)

    def head(self, name: str, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B *T O"]:
        """What the head `name` makes of hidden states."""
        return self.heads.find(name)(x)
