"""Mixers let tokens exchange information. One file each: the file's name is its name in a spec.

The contract, checked by `headway.testing.check_mixer`: `forward(x, *, mask, pos, state, context)` keeps the shape of
x; `CAN` says truthfully which masks and uses it honours, and `require` refuses the rest; `init_state` makes what a
stream remembers; `cost` tells FLOPs and state bytes. In a stream, padding stands on the left. For who looks inside:
heads lie side by side in what enters `out`; attention has `glance`, which tells its weights, others may have `implied`.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import msgspec
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.mask import Mask
from headway.positions import Positions
from headway.spec import convert, nearest
from headway.state import State

RUN = 1024  # tokens that `in_runs` takes at a time


class Cost(NamedTuple):
    """What one call costs: floating-point operations of its matrix products, bytes that a stream remembers, and bytes
    of activations that training keeps for the way back, with the kernel `attend` takes by default."""

    flops: int
    state_bytes: int
    activation_bytes: int


class Implied(NamedTuple):
    """What a mixer does that forms no weights, as a map: its output is `finish(map @ values)`.

    map: zero where a query does not reach, and at padding. finish: of `Float[B H T V]`, gives `Float[B T C]`. Where no
    one number weighs a whole token, the map tells sizes alone, and both are None. exact: gives the softmax of the
    same queries and keys, beside a map that may come near it. With `rows`, map and exact have those, and the rest is
    None.
    """

    map: Float[Tensor, "B H R S"]
    values: Float[Tensor, "B H S V"] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    exact: Callable[[], Float[Tensor, "B H R S"]] | None = None


class Mixer(nn.Module):
    """The base of every mixer. `CAN` lists, out of: causal, bidirectional, cross, padding, segments, window, sinks,
    prefix, globals, stream. Options are the keyword arguments of `__init__`, behind `width` and `positions`.

    A mixer may define `implied(x, *, mask, pos, context=None, rows=None) -> Implied`, of the same x, mask, pos and
    context as `forward`, without a state; `rows`, a slice, asks for those queries alone.
    """

    CAN: ClassVar[frozenset[str]] = frozenset()

    @property
    def can(self) -> frozenset[str]:
        """What this instance honours; an option may narrow what its class `CAN`."""
        return self.CAN

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        mask: Mask,
        pos: Int[Tensor, "B T"],
        state: State | None = None,
        context: Float[Tensor, "B S C"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        raise TypeError(f"{type(self).__name__} defines no forward")

    def init_state(self, batch: int, capacity: int, cross: bool = False) -> State:
        """An empty state for `batch` rows; `capacity` hints at the tokens to expect. `cross`: for a context."""
        raise ValueError(f"{type(self).__name__} cannot stream: it has no state")

    def cost(self, length: int, context_length: int | None = None) -> Cost:
        """Of one row of `length` tokens, forward, unpadded, in fp32; `state_bytes` after streaming them."""
        raise TypeError(f"{type(self).__name__} states no cost")

    def tie(self, earlier: Sequence[Mixer]) -> None:
        """Takes from `earlier`, the mixers in this slot of the stack's blocks below, what layers share; most share
        nothing."""

    def require(self, mask: Mask, state: State | None = None, context: Tensor | None = None) -> None:
        """Refuses loudly what this mixer cannot honour."""
        asked = mask.facts
        if context is not None:  # the positions of a context say nothing about those of the tokens
            if alien := asked - {"bidirectional", "padding", "segments"}:
                raise ValueError(
                    f"a mask over a context tells padding and segments, not {', '.join(sorted(alien))}: leave it out"
                )
            asked = asked - {"bidirectional"} | {"cross"}
        asked = asked | {"stream"} if state is not None else asked
        if missing := asked - self.can:
            name = type(self).__name__
            raise ValueError(
                f"{name} cannot do {', '.join(sorted(missing))}; it can do {', '.join(sorted(self.can))}: "
                "change the mask or choose another mixer (attention can do all)"
            )


def in_runs(
    mix: Callable[..., tuple[Any, ...]],
    x: Float[Tensor, "B T C"],
    pos: Int[Tensor, "B T"],
    mask: Mask,
    kept: tuple[Any, ...],
) -> tuple[Float[Tensor, "B T C"], tuple[Any, ...]]:
    """`mix(x, pos, mask, *kept)`, which gives outputs and what it keeps for later tokens, on runs of tokens in turn.

    What a layer makes of them then stays in the cache of a CPU, in memory used before: fresh memory costs more than
    what is done in it. All at once where the way back, packed sequences or a GPU ask for it.
    """
    whole = x.shape[1] <= RUN or torch.is_grad_enabled() or x.device.type != "cpu"
    if whole or not mask.causal or mask.segments is not None:
        y, *kept_on = mix(x, pos, mask, *kept)
        return y, tuple(kept_on)
    outputs = []
    valid = itertools.repeat(None) if mask.valid is None else mask.valid.split(RUN, 1)
    for tokens, at, there in zip(x.split(RUN, 1), pos.split(RUN, 1), valid, strict=False):
        y, *kept_on = mix(tokens, at, mask if there is None else replace(mask, valid=there), *kept)
        kept = tuple(kept_on)
        outputs.append(y)
    return torch.cat(outputs, 1), kept


def linear_map(
    mix: Callable[[Tensor, slice, tuple[Any, ...]], tuple[Tensor, tuple[Any, ...]]],
    values: Float[Tensor, "B H S _"],
    queries: int,
    rows: slice | None = None,
    *,
    size: int | None = None,
) -> Float[Tensor, "B H R S"]:
    """The map M of a `mix` that gives M v of any v, `Float[B H S *]`: row t is the gradient of output t.

    It asks for no more than the rows that are wanted, through the mixer's own fast form. `mix(v, run, kept)` gives the
    outputs of the tokens in `run`, v being theirs, and what later ones need: first what is linear in v, then the rest.
    All are one run, or with `size` so many tokens, of which one is held at a time; the first has nothing `kept`.
    """
    batch, heads, keys, _ = values.shape
    wanted = torch.arange(queries, device=values.device)[rows or slice(None)]
    found = values.new_zeros(batch, heads, keys, len(wanted))
    runs = [slice(start, min(start + (size or keys), keys)) for start in range(0, keys, size or keys)]
    runs = [run for run in runs if size is None or run.start <= int(wanted[-1])]  # what comes later is not seen
    entering: list[tuple[Any, ...]] = [()]
    with torch.no_grad():
        for run in runs[:-1]:
            entering.append(mix(found[:, :, run], run, entering[-1])[1])
    owed: tuple[Tensor, ...] = ()  # by what the run leaves to later ones
    for run, kept in zip(reversed(runs), reversed(entering), strict=True):
        with torch.enable_grad():
            v, before = torch.zeros_like(found[:, :, run]).requires_grad_(), tuple(t.requires_grad_() for t in kept[:1])
            y, after = mix(v, run, (*before, *kept[1:]))
        here = wanted if size is None else wanted - run.start
        there = (here >= 0) & (here < y.shape[2])
        each = torch.zeros_like(y)
        each[:, :, here[there], there.nonzero()[:, 0]] = 1
        found[:, :, run], *owed = torch.autograd.grad((y, *after[: len(owed)]), (v, *before), (each, *owed))  # type: ignore[assignment]
    return found.mT


def without_padding(
    found: Float[Tensor, "B H R S"], mask: Mask, context: Tensor | None, rows: slice | None
) -> Float[Tensor, "B H R S"]:
    """`found` with zeros at padding: keys, and queries where they are the same tokens."""
    if mask.valid is None:
        return found
    there = mask.valid[:, None, None, :]
    if context is None:
        there = there & mask.valid[:, None, rows or slice(None), None]
    return found.masked_fill(~there, 0.0)


def of_run(mask: Mask, run: slice) -> Mask:
    """The mask of the tokens of a run among themselves; of one that has no segments."""
    return mask if mask.valid is None else replace(mask, valid=mask.valid[:, run])


def names() -> list[str]:
    """Headway's own mixers, found by file name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> type[Mixer]:
    """The mixer class of a name, or of the dotted path of a module that the user's own code has imported."""
    if "." not in name:
        if name not in names():
            raise ValueError(f"no mixer '{name}'{nearest(name, names())}")
        module = importlib.import_module(f"{__name__}.{name}")
    elif name not in sys.modules:
        raise ValueError(
            f"mixer '{name}' is not imported, and a spec never runs code: "
            f"`import {name}` before, or pass --plugin {name}"
        )
    else:
        module = sys.modules[name]
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mixer) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"a mixer's file defines one Mixer; {module.__name__} defines {len(found)}")
    return found[0]


def options(named: dict[str, Any]) -> tuple[type[Mixer], dict[str, Any]]:
    """The class and the checked options of {"name": ..., option: value}."""
    if not isinstance(named.get("name"), str):
        raise ValueError(f"a mixer is {{'name': one of {', '.join(names())}, option: value}}, not {named!r}")
    kind = find(named["name"])
    signature = inspect.signature(kind.__init__, eval_str=True)
    fields = [
        (p.name, p.annotation) if p.default is p.empty else (p.name, p.annotation, p.default)
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name != "positions"
    ]
    known = msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True, kw_only=True)
    given = {key: value for key, value in named.items() if key != "name"}
    return kind, msgspec.structs.asdict(convert(given, known, f"mixer {named['name']}"))


def build(named: dict[str, Any], width: int, positions: Positions) -> Mixer:
    """A mixer from {"name": ..., option: value}; a wrong option is an error that names the nearest right one."""
    kind, chosen = options(named)
    return kind(width, positions=positions, **chosen)


def heads(named: dict[str, Any] | None) -> int | None:
    """How many heads a mixer has, where it has any."""
    return None if named is None else options(named)[1].get("heads")


def head_dim(named: dict[str, Any], width: int) -> int | None:
    """The head width that rotary positions need, where the mixer has heads at all."""
    _, chosen = options(named)
    if "heads" not in chosen:
        return None
    return chosen.get("head_dim") or width // chosen["heads"]
