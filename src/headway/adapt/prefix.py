"""Prefix tuning (2101.00190): each layer's attention also sees `length` learned keys and values, before all others.

y = W_o attend(W_q x, [P_k; W_k c], [P_v; W_v c]) in the encoder, in the decoder and over the context. The prefix takes
positions 0 to length - 1 and is not rotated, so the tokens stand behind it. With `hidden`, it is trained as
P = W_2 tanh(W_1 E), which the paper found steadier (its section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from msgspec import Meta
from torch import Tensor, nn

from headway.adapt._base import Adapter, own_class
from headway.adapt._before import begins, moved, widened
from headway.attend import FULL
from headway.block import Stack, States
from headway.mask import Mask
from headway.mixers.attention import Attention
from headway.state import Prefixed

Pair = tuple[Tensor, Tensor]  # a layer's keys and values, both Float[G n D]
SLOTS = {"self": "mixer", "cross": "cross"}


class Prefix(nn.Module):
    """The keys and values of several layers: `table` holds them, or what a small network makes them of."""

    def __init__(self, layers: Sequence[Attention], length: int, hidden: int) -> None:
        super().__init__()
        self.shapes = [(2, layer.kv_heads, layer.head_dim) for layer in layers]
        self.sizes = [2 * layer.kv_heads * layer.head_dim for layer in layers]
        device, whole = layers[0].out.weight.device, sum(self.sizes)
        empty = lambda *shape: nn.Parameter(torch.empty(shape, device=device).normal_(std=0.02))
        self.table = empty(length, layers[0].width if hidden else whole)
        self.inner = nn.ParameterDict()
        if hidden:
            self.inner["enter"], self.inner["enter_bias"] = empty(hidden, layers[0].width), empty(hidden)
            self.inner["leave"], self.inner["leave_bias"] = empty(whole, hidden), empty(whole)

    def whole(self) -> Float[Tensor, "n P"]:
        """All of it, layer by layer: keys, then values, head by head."""
        if not len(self.inner):
            return self.table
        net = self.inner
        return F.linear(F.linear(self.table, net["enter"], net["enter_bias"]).tanh(), net["leave"], net["leave_bias"])

    def pairs(self) -> list[Pair]:
        """Of each layer. It is no `forward`: what counts operations hooks those, and fails where nothing goes in."""
        by_layer = self.whole().split(self.sizes, 1)
        pairs = [t.unflatten(1, shape).permute(1, 2, 0, 3) for t, shape in zip(by_layer, self.shapes, strict=True)]
        return [(pair[0], pair[1]) for pair in pairs]


class Method(Adapter):
    """Stands at a stack and serves all its layers. length: keys and values a layer. at: attention of the tokens to
    themselves, over the context, or both. hidden: the inner width of the reparametrisation; 0: none."""

    TARGETS: ClassVar = ("stack", "encoder", "decoder")
    BY_ROW: ClassVar = False
    ALONE: ClassVar = True

    def __init__(
        self,
        module: Any,
        outputs: slice | None = None,
        *,
        length: Annotated[int, Meta(ge=1, le=2**16)] = 16,
        at: Literal["all", "self", "cross"] = "all",
        hidden: Annotated[int, Meta(ge=0, le=2**16)] = 0,
    ) -> None:
        super().__init__()
        self.length = length
        self.parts = nn.ModuleDict()
        for name, slot in SLOTS.items():
            there = [part.inner for block in module.blocks if (part := getattr(block, slot)) is not None]
            if at in ("all", name) and there:
                self.parts[name] = Prefix([_checked(mixer) for mixer in there], length, hidden)
        if not self.parts:
            raise ValueError(f"prefix: this stack has no attention for at='{at}': choose other targets, or at='all'")
        self.slots = [tuple(getattr(block, slot) is not None for slot in SLOTS.values()) for block in module.blocks]

    @classmethod
    def targets(cls, options: dict[str, Any]) -> tuple[str, ...]:
        return ("decoder",) if options["at"] == "cross" else cls.TARGETS

    @classmethod
    def fits(cls, module: nn.Module, name: str) -> bool:
        return own_class(module) is Stack

    def around(
        self,
        call: Callable[..., Tensor],
        amount: float,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: States | None = None,
        context: Float[Tensor, "B S C"] | None = None,
        context_mask: Mask = FULL,
    ) -> Float[Tensor, "B T C"]:
        if "self" in self.parts:
            pos = moved(pos, self.length)
            mask = widened(mask, self.length, "prefix") if state is None else mask
        if "cross" in self.parts:
            context_mask = widened(context_mask, self.length, "prefix")
        states = self._states(state, len(x), pos, x.dtype)
        return call(x, mask=mask, pos=pos, state=states, context=context, context_mask=context_mask)

    def _states(self, given: States | None, rows: int, pos: Tensor, dtype: torch.dtype) -> States:
        """The state of each layer with its prefix: around it, or already in it where it is a stream's own."""
        parts: Any = self.parts
        own, over = (iter(parts[name].pairs() if name in parts else ()) for name in SLOTS)
        states: States = []
        fresh = given is not None and "self" in self.parts and begins(given, "prefix")
        for i, (mixes, crosses) in enumerate(self.slots):
            kept, cross = (None, None) if given is None else given[i]
            if mixes and "self" in self.parts:
                k, v = next(own)
                if given is None:
                    kept = Prefixed(k, v)
                elif fresh:
                    at = torch.arange(self.length, device=pos.device).expand(rows, -1)
                    kept.append(*(t.to(dtype).expand(rows, -1, -1, -1) for t in (k, v)), at, padded=False)  # type: ignore[union-attr]
            if crosses and "cross" in self.parts:
                k, v = next(over)
                cross = Prefixed(k, v, cross)
            states.append((kept, cross))
        return states


def _checked(mixer: nn.Module) -> Attention:
    """Attention that sees a prefix wherever it stands."""
    if own_class(mixer) is not Attention:
        name = own_class(mixer).__module__.rpartition(".")[2]
        raise ValueError(f"prefix: a layer here mixes by {name}, which has no keys to stand before: choose lora")
    assert isinstance(mixer, Attention)
    if mixer.local.window is not None:
        raise ValueError(f"prefix: a layer here sees a window of {mixer.local.window}, which a prefix would fall out "
                         "of: choose lora, or targets without it")  # fmt: skip
    return mixer
