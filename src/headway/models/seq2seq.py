"""Encoder-decoder: reads a source, writes a target (1409.3215; with attention 1409.0473, 1706.03762).

p(y_t | y_<t, x) = softmax(W decoder(y_<t, encoder(x))). What mixes the tokens on either side, and how the decoder
looks at the encoder, is the spec's: an RNN with one fixed vector, a convolution, a Transformer.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.block import Stack, States
from headway.mask import Mask
from headway.positions import positions_of
from headway.spec import Size, StackSpec, Strict


class Spec(Strict, frozen=True):
    """Vocabularies come from the tokenizers where a recipe leaves them at 0.

    tie: the head shares the target's embedding. share: source and target share one embedding. head_bias: of the head.
    embed_scale multiplies what is embedded, logit_scale what the head reads.
    """

    width: Size
    encoder: StackSpec
    decoder: StackSpec
    source_vocab: Annotated[int, Meta(ge=0, le=2**24)] = 0
    target_vocab: Annotated[int, Meta(ge=0, le=2**24)] = 0
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    tie: bool = False
    share: bool = False
    head_bias: bool = True
    embed_scale: Annotated[float, Meta(gt=0)] = 1.0
    logit_scale: Annotated[float, Meta(gt=0)] = 1.0


class Memory(NamedTuple):
    """What the encoder leaves for the decoder: `x` is `Float[B S C]`, `valid` is `Bool[B S]` or None."""

    x: Tensor
    valid: Tensor | None


class Model(nn.Module):
    """An encoder stack and a decoder stack with their embeddings and a head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        if min(spec.source_vocab, spec.target_vocab) < 1:
            raise ValueError("seq2seq: source_vocab and target_vocab come from the tokenizers and are still 0")
        if all(block.cross is None for block in spec.decoder.blocks):
            raise ValueError("seq2seq: the decoder would never read the source: give one of its blocks a cross mixer")
        self.source = nn.Embedding(spec.source_vocab, spec.width)
        self.target = nn.Embedding(spec.target_vocab, spec.width)
        self.encoder = Stack(spec.encoder, spec.width, spec.dropout)
        self.decoder = Stack(spec.decoder, spec.width, spec.dropout)
        if spec.share:
            if spec.source_vocab != spec.target_vocab:
                sizes = f"{spec.source_vocab} and {spec.target_vocab}"
                raise ValueError(f"seq2seq: vocabularies of {sizes} share no embedding: leave out share")
            self.target.weight = self.source.weight
        self.embed_scale, self.logit_scale = spec.embed_scale, spec.logit_scale
        self.head = nn.Linear(spec.width, spec.target_vocab, bias=spec.head_bias)
        if spec.tie:
            self.head.weight = self.target.weight
        self.branches = max(self.encoder.branches, self.decoder.branches)

    def encode(self, source: Int[Tensor, "B S"], valid: Tensor | None = None, mask: Mask | None = None) -> Memory:
        """Reads the source; `valid` is `Bool[B S]`, false at padding, on either side; `mask` narrows who sees whom."""
        pos = positions_of(valid, source.shape[0], source.shape[1], source.device)
        x = self.source(source) if self.embed_scale == 1 else self.source(source) * self.embed_scale
        own = Mask(valid=valid)
        x = self.encoder(x, mask=own if mask is None else own & mask, pos=pos)
        if valid is not None and x.shape[1] > valid.shape[1]:  # a prompt was put before the source, and is read, too
            valid = F.pad(valid, (x.shape[1] - valid.shape[1], 0), value=True)
        return Memory(x, valid)

    def decode(
        self,
        target: Int[Tensor, "B T"],
        memory: Memory,
        *,
        pos: Int[Tensor, "B T"] | None = None,
        valid: Tensor | None = None,
        state: States | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the token behind each one of `target`. With a state, `pos` says where the new tokens stand."""
        return self.head_of(self.states(target, memory, pos=pos, valid=valid, state=state))

    def states(
        self,
        target: Int[Tensor, "B T"],
        memory: Memory,
        *,
        pos: Int[Tensor, "B T"] | None = None,
        valid: Tensor | None = None,
        state: States | None = None,
    ) -> Float[Tensor, "B T C"]:
        """The decoder's hidden states, of which `head_of` makes what `decode` gives."""
        if state is not None and pos is None:
            raise ValueError("seq2seq.decode: a stream needs pos=, the positions of the new tokens")
        if pos is None:
            pos = positions_of(valid, target.shape[0], target.shape[1], target.device)
        return self.decoder(
            self.embed_target(target),
            mask=Mask(causal=True, valid=valid),
            pos=pos,
            state=state,
            context=memory.x,
            context_mask=Mask(valid=memory.valid),
        )

    def embed_target(self, target: Int[Tensor, "B T"]) -> Float[Tensor, "B T C"]:
        """What enters the decoder, positions apart."""
        return self.target(target) if self.embed_scale == 1 else self.target(target) * self.embed_scale

    def head_of(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T V"]:
        """The logits of hidden states."""
        return self.head(x if self.logit_scale == 1 else x * self.logit_scale)

    def forward(
        self,
        source: Int[Tensor, "B S"],
        target: Int[Tensor, "B T"],
        source_valid: Tensor | None = None,
        target_valid: Tensor | None = None,
    ) -> Float[Tensor, "B T V"]:
        return self.decode(target, self.encode(source, source_valid), valid=target_valid)

    def init_state(self, batch: int, capacity: int) -> States:
        """What the decoder remembers between calls, empty."""
        return self.decoder.init_state(batch, capacity)
