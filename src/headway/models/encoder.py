"""Encoder: every token sees every other one (BERT, 1810.04805); heads read what comes out."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.block import Stack
from headway.heads import Heads, HeadSpec
from headway.mask import Mask
from headway.positions import positions_of
from headway.spec import Size, StackSpec, Strict


class Spec(Strict, frozen=True):
    """`vocab` comes from the tokenizer where a recipe leaves it at 0. `types`: kinds of segment that tokens tell apart
    by an embedding of their own; 0 for none."""

    width: Size
    stack: StackSpec
    vocab: Annotated[int, Meta(ge=0, le=2**24)] = 0
    types: Annotated[int, Meta(ge=0, le=2**16)] = 0
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    heads: dict[str, HeadSpec] = {}


class Model(nn.Module):
    """Embedding, stack, heads. `forward` gives the hidden states, `head` what a head makes of them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if spec.vocab < 1:
            raise ValueError("vocab comes from the tokenizer and is still 0")
        self.embedding = nn.Embedding(spec.vocab, spec.width)
        self.types = nn.Embedding(spec.types, spec.width) if spec.types else None
        self.stack = Stack(spec.stack, spec.width, spec.dropout)
        self.heads = Heads(spec.width, spec.heads, self.embedding)
        self.branches = self.stack.branches

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        valid: Bool[Tensor, "B T"] | None = None,
        *,
        types: Int[Tensor, "B T"] | None = None,
        mask: Mask | None = None,
        pos: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """`valid` is false at padding, on either side; `types` are 0 where not given; `mask` narrows who sees whom
        (segments, windows, global tokens); `pos` where tokens stand, when they are packed."""
        if pos is None:
            pos = positions_of(valid, ids.shape[0], ids.shape[1], ids.device)
        own = Mask(valid=valid)
        return self.stack(self.embed(ids, types), mask=own if mask is None else own & mask, pos=pos)

    def embed(self, ids: Int[Tensor, "B T"], types: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B T C"]:
        """What enters the stack, positions apart."""
        x = self.embedding(ids)
        if self.types is None:
            if types is not None and bool(types.any()):
                raise ValueError("this model tells no types of tokens apart: leave out types")
            return x
        return x + (self.types.weight[0] if types is None else self.types(types))

    def head(
        self,
        name: str,
        x: Float[Tensor, "B T C"],
        ids: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B *T O"]:
        """What the head `name` makes of hidden states."""
        return self.heads.find(name)(x, ids, valid)
