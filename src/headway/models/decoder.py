"""Decoder: each token sees itself and those before it, and says which comes next (GPT-2; Llama 2302.13971).

p(x_t | x_<t) = softmax(W stack(x_<t)). With a state it reads a stream, a token or many at a time.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Bool, Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.block import Stack, States
from headway.heads import Heads, HeadSpec
from headway.mask import Mask
from headway.positions import positions_of
from headway.spec import Size, StackSpec, Strict


class Spec(Strict, frozen=True):
    """`vocab` comes from the tokenizer where a recipe leaves it at 0; the head named "lm" gives the next token."""

    width: Size
    stack: StackSpec
    vocab: Annotated[int, Meta(ge=0, le=2**24)] = 0
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    heads: dict[str, HeadSpec] = {}


class Model(nn.Module):
    """Embedding, causal stack, heads. `forward` gives the hidden states, `head` what a head makes of them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if spec.vocab < 1:
            raise ValueError("vocab comes from the tokenizer and is still 0")
        self.embedding = nn.Embedding(spec.vocab, spec.width)
        self.stack = Stack(spec.stack, spec.width, spec.dropout)
        self.heads = Heads(spec.width, spec.heads, self.embedding)
        self.branches = self.stack.branches

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        valid: Bool[Tensor, "B T"] | None = None,
        *,
        mask: Mask | None = None,
        pos: Int[Tensor, "B T"] | None = None,
        state: States | None = None,
    ) -> Float[Tensor, "B T C"]:
        """`valid` is false at padding, on either side (in a stream: on the left). `mask` narrows who sees whom. With a
        `state`, `pos` says where the new tokens stand, -1 at padding."""
        if pos is None:
            if state is not None:
                raise ValueError("decoder: a stream needs pos=, the positions of the new tokens")
            pos = positions_of(valid, ids.shape[0], ids.shape[1], ids.device)
        own = Mask(causal=True, valid=valid)
        return self.stack(self.embedding(ids), mask=own if mask is None else own & mask, pos=pos, state=state)

    def head(
        self,
        name: str,
        x: Float[Tensor, "B T C"],
        ids: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B *T O"]:
        """What the head `name` makes of hidden states."""
        return self.heads.find(name)(x, ids, valid)

    def init_state(self, batch: int, capacity: int) -> States:
        """What the model remembers between calls, empty."""
        return self.stack.init_state(batch, capacity)
