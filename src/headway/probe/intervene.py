"""Interventions: heads scaled or switched off, how much each of them matters, and states put from one input in another.

A head's gate g stands where its output enters the last map of its mixer, out(g_1 y_1, ..., g_H y_H), in every mixer
with heads. All of it is undone afterwards, also where something fails in between.
Importance: E |d metric / d g| at g = 1 (1905.10650). Activation patching: 2202.05262, 2309.16042.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.loaded import Loaded
from headway.probe import maps
from headway.probe.capture import Place, mixers_of
from headway.probe.lens import outcome
from headway.probe.stacks import eager, is_compiled, leaving, stack_at, still

if TYPE_CHECKING:
    from headway.probe.look import Look

Metric = Callable[
    [Tensor], Tensor
]  # of a head's outputs (`outcome`): a number for each row of the batch, or one for all


class Here(NamedTuple):
    """A mixer and its place."""

    place: Place
    mixer: Any


@contextmanager
def ablate(
    model: Look | Loaded | nn.Module,
    heads: Sequence[tuple[int, int]],
    *,
    scale: float = 0.0,
    stack: str | None = None,
    slot: str | None = None,
) -> Iterator[None]:
    """Inside, the output of each of these heads, (layer, head), is multiplied by `scale`, in whatever the model does,
    writing text included. `stack`, `slot`: as in `look.map`, the same for all."""
    net = model if isinstance(model, nn.Module) else model.net
    there = [Here(*each) for each in mixers_of(net)]
    gates: dict[Any, Tensor] = {}
    for layer, head in heads:
        found: Here = maps.find(there, layer, stack, slot)
        count = _heads(found)
        if not 0 <= head < count:
            where = f"layer {layer} of '{found.place.stack}'"
            raise ValueError(f"ablate: no head {head} in {where}, whose heads are 0 to {count - 1}")
        gates.setdefault(found.mixer, torch.ones(count))[head] = scale
    with ExitStack() as hooks:
        hooks.enter_context(eager() if is_compiled(net) else nullcontext())
        for mixer, gate in gates.items():
            hooks.enter_context(gated(mixer, gate))
        yield


def _heads(found: Here) -> int:
    count = getattr(found.mixer, "heads", None)
    if count is None:
        place = found.place
        raise ValueError(
            f"ablate: layer {place.layer} of '{place.stack}' is {place.mixer}, which has no heads: choose another layer"
        )
    return count


@contextmanager
def gated(mixer: Any, gates: Float[Tensor, "*B H"]) -> Iterator[None]:
    """Multiplies what each head gives by its gate. `out` is looked up at each call: packing weights replaces it."""
    inner: list[Any] = []

    def scaled(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        y = inputs[0]
        return (y.unflatten(-1, (mixer.heads, -1)) * gates.to(y)[..., None]).flatten(-2)

    def enter(module: Any, inputs: Any) -> None:
        inner.append(module.out.register_forward_pre_hook(scaled))

    def leave(module: Any, inputs: Any, output: Any) -> None:
        if inner:
            inner.pop().remove()

    handles = [mixer.register_forward_pre_hook(enter), mixer.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles + inner:
            handle.remove()


def importance(
    look: Look, metric: Metric, *, head: str | None = None, stack: str | None = None, slot: str | None = None
) -> Float[Tensor, "L H"]:
    """How much the metric would change with each head's gate: the mean over the rows of |d metric / d gate|.

    metric: of what the model's head makes of its states (`head`: which; "lm" or the only one with outputs where not
    said), or of what `forward` gives where it has none; differentiable, a number a row. NaN where there is no head.
    """
    name, body = stack_at(look.net, stack)
    there = [Here(*each) for each in mixers_of(look.net)]
    layers = [_at(there, layer, name, slot) for layer in range(len(body.blocks))]
    widest = max((one.mixer.heads for one in layers if one is not None), default=0)
    if not widest:
        raise ValueError(f"importance: no mixer of '{name}' has heads to tell apart: use influence")
    found = torch.full((len(layers), widest), torch.nan)
    given = {one.mixer: one.x for one in look.seen}  # a tower's rows are its own
    with still(look.net), ExitStack() as hooks:
        gates = {
            layer: torch.ones(
                len(given[one.mixer]), 1, one.mixer.heads, device=given[one.mixer].device
            ).requires_grad_()
            for layer, one in enumerate(layers)
            if one is not None
        }
        for layer, gate in gates.items():
            hooks.enter_context(gated(layers[layer].mixer, gate))  # type: ignore[union-attr]
        value = _measured(metric, outcome(look, head))
        if not value.requires_grad:
            raise ValueError("importance: the metric has no gradient: let it be a smooth function of what it is given")
        gradients = torch.autograd.grad(value.sum(), list(gates.values()), materialize_grads=True)
    for layer, gradient in zip(gates, gradients, strict=True):
        found[layer, : gradient.shape[2]] = gradient.abs().mean(0)[0].cpu()
    return found


def _at(there: list[Here], layer: int, stack: str, slot: str | None) -> Here | None:
    """The mixer of a layer whose heads can be gated; None where it has none."""
    for one in there:
        if (one.place.stack, one.place.layer) == (stack, layer) and slot in (None, one.place.slot):
            return one if hasattr(one.mixer, "heads") else None
    return None


def _measured(metric: Metric, output: Tensor) -> Tensor:
    value = metric(output)
    if not isinstance(value, Tensor) or value.ndim > 1:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the metric is a tensor of one number a row, or of one number, not {what}")
    return value


class Patched(NamedTuple):
    """restored: of each layer and token, the share of the way from `corrupted` to `clean`, the metric's two values,
    that the clean state there alone brings back: 1 is all of it."""

    restored: Float[Tensor, "L T"]
    clean: float
    corrupted: float


@torch.no_grad()
def patch(
    clean: Look, corrupted: Look, metric: Metric, *, head: str | None = None, stack: str | None = None
) -> Patched:
    """Runs the corrupted input again and again, each time with what one layer gave for one token of the clean one.

    Both are looks of one model at inputs of equal length. metric, head: as in `importance`; rows are averaged. It takes
    a run for every layer and token whose states differ.
    """
    if clean.net is not corrupted.net:
        raise ValueError("patch: two models: look at both inputs with the same one")
    name, body = stack_at(clean.net, stack)
    with eager() if is_compiled(clean.net) else nullcontext():
        (kept, reached), (own, missed) = (_run(one, metric, head, body) for one in (clean, corrupted))
        if kept[0].shape != own[0].shape:
            (rows, tokens), (others, theirs) = kept[0].shape[:2], own[0].shape[:2]
            size = f"{rows} x {tokens} tokens in '{name}', the other {others} x {theirs}"
            raise ValueError(f"patch: it goes token by token, and one input has {size}: give inputs of equal length")
        if reached == missed:
            raise ValueError(f"patch: the metric is {reached:.6g} for both inputs: there is nothing to restore")
        found = torch.full((len(kept), kept[0].shape[1]), missed)
        for layer, (states, before) in enumerate(zip(kept, own, strict=True)):
            for token in range(states.shape[1]):
                if torch.equal(states[:, token], before[:, token]):
                    continue  # before what differs a causal model is the same
                mixed = before.clone()
                mixed[:, token] = states[:, token]
                with _resumed(body, layer, mixed):
                    found[layer, token] = float(_measured(metric, outcome(corrupted, head)).mean())
    return Patched((found - missed) / (reached - missed), reached, missed)


def _run(look: Look, metric: Metric, head: str | None, body: Any) -> tuple[list[Tensor], float]:
    """What each layer gives, and the metric."""
    states, output = leaving(lambda: outcome(look, head), body.blocks)
    return states, float(_measured(metric, output).mean())


@contextmanager
def _resumed(body: Any, layer: int, states: Tensor) -> Iterator[None]:
    """Inside, a stack goes on from what `layer` is said to have left, without the layers up to there."""
    blocks = body.blocks
    body.blocks = nn.ModuleList([_Left(states), *blocks[layer + 1 :]])
    try:
        yield
    finally:
        body.blocks = blocks


class _Left(nn.Module):
    """In place of some blocks: what they left."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        return self.states
