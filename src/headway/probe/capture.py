"""Capture: what every mixer of a model was given, caught by hooks while the model runs as it always does.

A hook only keeps references, so the fast kernel stays on and no bit of the output changes. A compiled model gives its
output without any hook, and what its mixers see is caught in a second, eager run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.attend import Glance
from headway.mask import Mask
from headway.mixers import Mixer
from headway.probe.stacks import bare, before, eager, is_compiled, modules_of, name_of
from headway.state import Prefixed

UNSAID = (
    "an adapter puts tokens that nobody wrote before all others, and no map could name them: look without it (inside "
    "`with headway.adapt.bare(model)`)"
)


class Place(NamedTuple):
    """A mixer in a model: the stack it is in, its layer there, "self" or "cross", its name in a spec, its heads.

    has_maps: whether it forms attention weights. queries, keys: the sides (`look.tokens`) that look and are looked at.
    """

    stack: str
    layer: int
    slot: str
    mixer: str
    heads: int
    has_maps: bool
    queries: str
    keys: str


class Seen(NamedTuple):
    """What the mixer of a place was given: its own tokens, the mask, their positions, and the context it looked at."""

    place: Place
    mixer: Any
    x: Float[Tensor, "B T C"]
    mask: Mask
    pos: Int[Tensor, "B T"]
    context: Float[Tensor, "B S C"] | None

    def glance(self) -> Glance:
        """The same call taken apart, by the mixer's own projections."""
        return self.mixer.glance(self.x, mask=self.mask, pos=self.pos, context=self.context)


def capture(net: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[Seen]]:
    """What `run`, which calls `net`, gives, and what each mixer was given, in the order of the model."""
    parts = modules_of(net)  # walked once: at a dozen tokens a walk is a hundredth of the model's own time
    compiled = is_compiled(parts)
    with torch.no_grad():
        output = run() if compiled else None
        seen: dict[int, Seen] = {}
        found = _mixers_in(parts)
        with ExitStack() as hooks, eager() if compiled else nullcontext():
            for i, (place, mixer) in enumerate(found):
                hooks.enter_context(before(mixer, _keeper(seen, i, place)))
            eagerly = run()
    return output if compiled else eagerly, [seen[i] for i in sorted(seen)]


def _keeper(seen: dict[int, Seen], i: int, place: Place) -> Callable[..., None]:
    def keep(mixer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if isinstance(named.get("state"), Prefixed):
            raise ValueError(f"look: {UNSAID}")
        if named.get("state") is not None:
            raise ValueError("look: a stream remembers only what it needs: look at the whole text at once, no state")
        if i in seen:
            raise ValueError(f"look: layer {place.layer} of '{place.stack}' ran twice: look at one call of the model")
        seen[i] = Seen(place, mixer, inputs[0], named["mask"], named["pos"], named.get("context"))

    return keep


def refuse_unsaid(seen: Sequence[Seen], tokens: Mapping[str, Sequence[str]]) -> None:
    """Refuses mixers that saw more tokens than there are to name."""
    for one in seen:
        if one.x.shape[1] > len(tokens[one.place.queries]):
            raise ValueError(f"look: {UNSAID}")


def refuse_nan(net: nn.Module, output: Any, seen: Sequence[Seen]) -> None:
    """NaN in the output is an error that says where it came from: weights, inputs, or a layer."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or not bool(output.isnan().any()):
        return
    name = next((name for name, p in net.named_parameters() if p.is_floating_point() and bool(p.isnan().any())), None)
    if name is not None:
        raise ValueError(f"look: the weight '{name}' holds NaN: load the model again, or train it at a lower rate")
    if not seen or bool(seen[0].x.isnan().any()):
        raise ValueError("look: NaN in the inputs, and so in all that the model gives: look at where they come from")
    before = [one.place for one in seen if not bool(one.x.isnan().any())][-1]
    where = f"layer {before.layer} of '{before.stack}'"
    raise ValueError(f"look: NaN comes out of {where}, whose weights and inputs hold none: try float32")


def mixers_of(net: nn.Module) -> list[tuple[Place, Mixer]]:
    """Every mixer of a model with its place, stack by stack, layer by layer."""
    return _mixers_in(modules_of(bare(net)))


def _mixers_in(parts: list[tuple[str, nn.Module]]) -> list[tuple[Place, Mixer]]:
    found: list[tuple[Place, Mixer]] = []
    for name, module in parts:
        if isinstance(module, Mixer):
            found.append((_place(*_address(name, len(found)), module), module))
    return found


def _address(name: str, count: int) -> tuple[str, int, str]:
    """Stack, layer and slot of "towers.text.stack.blocks.3.cross.inner"; a mixer outside of a stack is counted."""
    parts = name.split(".")
    slot = "cross" if "cross" in parts else "self"
    if "blocks" not in parts:
        return "stack", count, slot
    at = len(parts) - 1 - parts[::-1].index("blocks")
    return name_of(parts[:at]), int(parts[at + 1]), slot


def _place(stack: str, layer: int, slot: str, mixer: Mixer) -> Place:
    name = type(mixer).__module__.removeprefix("headway.mixers.")
    sides = {"stack": "source", "encoder": "source", "decoder": "target"}
    own = sides.get(stack, stack)
    keys = "source" if slot == "cross" else own
    heads = getattr(mixer, "heads", 1)
    return Place(stack, layer, slot, name, heads, hasattr(mixer, "glance"), own, keys)
