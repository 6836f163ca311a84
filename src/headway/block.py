"""Block and Stack: the one way parts are wired, for every model in Headway.

    x -> [norm -> mixer -> +] -> [norm -> cross -> +] -> [norm -> feedforward -> +] -> y

Each bracket is a `Residual`; where the norm stands (pre, post, sandwich) is which parts are passed to it, and an
absent part is an Identity, so that there is one forward and no flag in it. `parallel` sums branches that read x itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from headway import mixers
from headway.attend import FULL
from headway.layers import Dropout, FeedForward, Scale, norm
from headway.mask import Mask
from headway.positions import Positions, build_positions
from headway.spec import BlockSpec, StackSpec
from headway.state import State

DEEPEST = 2**12  # beyond it a spec is a mistake or an attack
States = list[tuple[State | None, State | None]]  # per block: the mixer's and the cross mixer's


class Residual(nn.Module):
    """after(x + dropout(behind(inner(before(x))))), every part but `inner` possibly Identity."""

    inner: Any  # a Mixer or a FeedForward

    def __init__(
        self, inner: nn.Module, before: nn.Module, behind: nn.Module, after: nn.Module, dropout: nn.Module
    ) -> None:
        super().__init__()
        self.inner, self.before, self.behind, self.after, self.dropout = inner, before, behind, after, dropout

    def forward(self, x: Float[Tensor, "B T C"], apply: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T C"]:
        """`apply` calls `inner` with what it needs besides the tokens."""
        return self.after(x + self.dropout(self.behind(apply(self.before(x)))))


class Branch(Residual):
    """The same without the sum: for blocks that add all their branches at once."""

    def forward(self, x: Float[Tensor, "B T C"], apply: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T C"]:
        return self.dropout(self.behind(apply(self.before(x))))


class Block(nn.Module):
    """One block: up to three residuals in a row. `None` stands for a part that is absent."""

    def __init__(self, mixer: Residual | None, cross: Residual | None, feedforward: Residual | None) -> None:
        super().__init__()
        self.mixer, self.cross, self.feedforward = mixer, cross, feedforward

    def branches(
        self,
        mask: Mask,
        pos: Tensor,
        state: tuple[State | None, State | None],
        context: Tensor | None,
        context_mask: Mask,
    ) -> list[tuple[Residual, Callable[[Tensor], Tensor]]]:
        """The parts that are there, in order, each with the call that gives its inner module what it needs."""
        parts: list[tuple[Residual, Callable[[Tensor], Tensor]]] = []
        if (mixer := self.mixer) is not None:
            parts.append((mixer, lambda h: mixer.inner(h, mask=mask, pos=pos, state=state[0])))
        if (cross := self.cross) is not None:
            if context is None:
                raise ValueError("this block has a cross mixer and was given no context: pass context=")
            call = lambda h: cross.inner(h, mask=context_mask, pos=pos, state=state[1], context=context)
            parts.append((cross, call))
        if self.feedforward is not None:
            parts.append((self.feedforward, self.feedforward.inner))
        return parts

    def init_state(self, batch: int, capacity: int) -> tuple[State | None, State | None]:
        """The states of the mixer and of the cross mixer, empty."""
        return (
            self.mixer.inner.init_state(batch, capacity) if self.mixer is not None else None,
            self.cross.inner.init_state(batch, capacity, cross=True) if self.cross is not None else None,
        )

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: tuple[State | None, State | None] = (None, None),
        context: Float[Tensor, "B S C"] | None = None,
        context_mask: Mask = FULL,
    ) -> Float[Tensor, "B T C"]:
        for part, apply in self.branches(mask, pos, state, context, context_mask):
            x = part(x, apply)
        return x


class ParallelBlock(Block):
    """x + the sum of all branches, each reading x itself (GPT-J, PaLM 2204.02311)."""

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: tuple[State | None, State | None] = (None, None),
        context: Float[Tensor, "B S C"] | None = None,
        context_mask: Mask = FULL,
    ) -> Float[Tensor, "B T C"]:
        y = x
        for part, apply in self.branches(mask, pos, state, context, context_mask):
            y = y + part(x, apply)
        return y


def build_block(spec: BlockSpec, width: int, positions: Positions, dropout: float) -> Block:
    """A block from its spec."""
    before, behind, after = {  # which of them is a norm
        "pre": (True, False, False),
        "post": (False, False, True),
        "sandwich": (True, True, False),
        "parallel": (True, False, False),
    }[spec.wiring]
    residual, block = (Branch, ParallelBlock) if spec.wiring == "parallel" else (Residual, Block)

    def place(is_norm: bool) -> nn.Module:
        return norm(spec.norm, width, spec.norm_eps) if is_norm else nn.Identity()

    def wire(inner: nn.Module | None) -> Residual | None:
        if inner is None:
            return None
        end = place(behind)
        if spec.layer_scale is not None:
            scale = Scale(width, spec.layer_scale)
            end = scale if isinstance(end, nn.Identity) else nn.Sequential(end, scale)
        return residual(inner, place(before), end, place(after), Dropout(dropout))

    return block(
        wire(mixers.build(spec.mixer, width, positions) if spec.mixer is not None else None),
        wire(mixers.build(spec.cross, width, Positions()) if spec.cross is not None else None),
        wire(FeedForward(width, spec.feedforward) if spec.feedforward is not None else None),
    )


class Stack(nn.Module):
    """Positions, then blocks, then a last norm: the body of every model."""

    def __init__(self, spec: StackSpec, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        if not spec.blocks:
            raise ValueError("a stack has one block or more, and this one has none: give it `blocks`")
        if (depth := len(spec.blocks) * spec.repeat) > DEEPEST:
            raise ValueError(f"a stack has at most {DEEPEST} blocks; this one has {depth}")
        blocks = spec.blocks * spec.repeat
        found = [mixers.head_dim(block.mixer, width) for block in blocks if block.mixer is not None]
        dims = {dim for dim in found if dim is not None}
        if len(dims) > 1:
            raise ValueError(f"the attention mixers of one stack share a head width; these differ: {sorted(dims)}")
        counts = {heads for block in blocks if (heads := mixers.heads(block.mixer)) is not None}
        self.positions = build_positions(
            spec.positions, width, next(iter(dims), None), next(iter(counts)) if len(counts) == 1 else None
        )
        self.dropout = Dropout(dropout)
        self.blocks: Any = nn.ModuleList(build_block(block, width, self.positions.inside, dropout) for block in blocks)
        first, last = blocks[0], blocks[-1]
        self.first_norm = norm(first.norm, width, first.norm_eps) if spec.first_norm else nn.Identity()
        self.norm = norm(last.norm, width, last.norm_eps) if spec.final_norm else nn.Identity()
        for slot in ("mixer", "cross"):
            inner = [part.inner for block in self.blocks if (part := getattr(block, slot)) is not None]
            for i, mixer in enumerate(inner):
                mixer.tie(inner[:i])

    @property
    def branches(self) -> int:
        """Residual branches between input and output, for the initial weights."""
        return sum(isinstance(module, Residual) for module in self.modules())

    def init_state(self, batch: int, capacity: int) -> States:
        """One state a mixer, as a plain list; pass it to every call of a stream."""
        return [block.init_state(batch, capacity) for block in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: States | None = None,
        context: Float[Tensor, "B S C"] | None = None,
        context_mask: Mask = FULL,
    ) -> Float[Tensor, "B T C"]:
        """`pos` is -1 exactly where `mask.valid` is false; within a sequence it counts up by one."""
        x = self.dropout(self.first_norm(self.positions.embed(x, pos)))
        for i, block in enumerate(self.blocks):
            kept = state[i] if state is not None else (None, None)
            x = block(x, mask=mask, pos=pos, state=kept, context=context, context_mask=context_mask)
        return self.norm(x)


def reorder(states: States, rows: Int[Tensor, " R"]) -> None:
    """Reorders every state of a stack; cross states that were never written stay empty."""
    for pair in states:
        for state in pair:
            if state is not None:
                state.reorder(rows)
