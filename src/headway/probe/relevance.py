"""Relevance: which tokens a score comes from, by attention weighed with the score's own gradient (2103.15679).

r <- r + r mean_h (A * dy/dA)^+ from the last layer to the first, dy/dA = (dy/dO) V^T. It begins at the hidden states
that the score reads, each in proportion to its gradient: the class token alone, say, or all that a mean is taken of.
What they are to themselves, before any attention, is left out of the answer: it says nothing of the input.
Unlike the paper's, the rule for cross-attention moves r as it is, neither transposed nor scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.attend import Glance
from headway.models import decoder, dual, encoder, seq2seq, vision
from headway.probe.capture import Place, Seen
from headway.probe.flow import follow, of_stack
from headway.probe.stacks import bare, before, check_row, head_at, stack_at, still

if TYPE_CHECKING:
    from headway.probe.look import Look

Target = int | str | Callable[[Tensor], Tensor] | None


def relevance(look: Look, target: Target, at: int | None, row: int) -> dict[str, Float[Tensor, " S"]]:
    """See `Look.relevance`."""
    if not look.seen:
        raise ValueError("relevance: this module holds no mixer of Headway's: look at a model")
    check_row(row, *(one.x for one in look.seen))
    score = _score(look, target, at, row)
    stacks = list(dict.fromkeys(one.place.stack for one in look.seen))
    stacks = ["decoder"] if "decoder" in stacks else stacks  # the encoder is read through it alone
    for stack in stacks:
        of_stack(look.seen, stack)  # refuses what forms no weights before anything is computed
    outputs, ends = _gradients(look, score, stacks)

    def weigh(one: Seen, given: Glance, rows: slice) -> Tensor:
        dy = outputs[one.place][row : row + 1].unflatten(-1, (one.place.heads, -1)).transpose(1, 2)
        return (given.rows(rows) * given.pulled(dy, rows, slice(None)))[0].clamp(min=0).mean(0)

    answer: dict[str, Tensor] = {}
    with torch.no_grad():
        for stack, end in ends.items():
            size = end[row].float().norm(dim=-1)
            if not 0 < float(size.sum()) < torch.inf:
                raise ValueError(f"relevance: the target's gradient is {float(size.sum()):g} at '{stack}', so nothing "
                                 "carries it: choose a target that depends on this row, or float32")  # fmt: skip
            start = (size / size.sum())[None]
            found = follow(look.seen, stack, row, start, weigh, 1.0, 1.0)
            own = of_stack(look.seen, stack)[1][0].place.queries
            answer |= {side: (each - start if side == own else each)[0] for side, each in found.items()}
    return answer


def _gradients(
    look: Look, score: Callable[[Any], Tensor], stacks: list[str]
) -> tuple[dict[Place, Tensor], dict[str, Tensor]]:
    """What the score's gradient is with respect to A V of every place, `Float[B T HE]`, and to each stack's output."""
    held: dict[Place, Tensor] = {}
    last: dict[str, Tensor] = {}

    def hold(place: Place) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            y = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            held[place] = y
            return (y, *inputs[1:]), named

        return hook

    with still(look.net), ExitStack() as hooks:
        for one in look.seen:
            if one.place.has_maps:
                hooks.enter_context(before(one.mixer.out, hold(one.place)))
        for name in stacks:
            _, body = stack_at(look.net, name)
            handle = body.register_forward_hook(lambda module, inputs, x, name=name: last.__setitem__(name, x))
            hooks.callback(handle.remove)
        value = score(look.rerun())
        if value.ndim or not value.requires_grad:
            raise ValueError("relevance: the target is one number that depends on what the model gave, and this is "
                             f"{'a constant' if not value.ndim else f'a tensor {list(value.shape)}'}")  # fmt: skip
        wanted = [*held.values(), *last.values()]
        given = torch.autograd.grad(value, wanted, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for g, t in zip(given, wanted, strict=True)]
    return dict(zip(held, found, strict=False)), dict(zip(last, found[len(held) :], strict=True))


def _score(look: Look, target: Target, at: int | None, row: int) -> Callable[[Any], Tensor]:
    """The number that is explained, as a function of what the model gives."""
    if callable(target):
        return target
    body = bare(look.net)
    if isinstance(body, dual.Model):
        _refuse(target, at, "a model of two towers is explained by its score")
        return lambda scores: scores[row, row]
    if isinstance(body, seq2seq.Model):
        return lambda logits: _chosen(logits[row, _at(at, logits.shape[1])], target, ())
    if not isinstance(body, encoder.Model | decoder.Model | vision.Model):
        raise ValueError("relevance: say of what, as a function of the output: relevance(lambda output: ...)")
    name, head = _head(body)
    if head.spec.pool == "none":
        if at is None and not isinstance(body, decoder.Model):
            raise ValueError(f"relevance: the head '{name}' says something of each token: say of which, at=")
        where = _at(at, look.seen[0].x.shape[1], look.reading.valid.get("source"), row)
        return lambda x: _chosen(head(x[row : row + 1, where : where + 1])[0, 0], target, head.spec.labels)
    _refuse(None, at, f"the head '{name}' reads the whole input")
    ids = look.reading.ids.get("source")
    given = () if ids is None else (ids, look.reading.valid.get("source"))
    return lambda x: _chosen(body.head(name, x, *given)[row], target, head.spec.labels)


def _head(body: Any) -> tuple[str, Any]:
    name = head_at(body, None)
    if name is None:
        there = f"{', '.join(body.heads) or 'no'} heads"
        raise ValueError(f"relevance: this model has {there}, so say of what: relevance(lambda hidden: ...)")
    return name, body.heads[name]


def _at(at: int | None, count: int, valid: Tensor | None = None, row: int = 0) -> int:
    if at is None:
        return count - 1 if valid is None else int(valid[row].nonzero()[-1])
    if not -count <= at < count:
        raise ValueError(f"relevance: no token {at}; the tokens are 0 to {count - 1}")
    return at % count


def _chosen(logits: Float[Tensor, " O"], target: int | str | None, labels: tuple[str, ...]) -> Float[Tensor, ""]:
    """One of a head's outputs; the largest where none is named."""
    if target is None:
        return logits.max()
    if isinstance(target, str):
        if target not in labels:
            raise ValueError(
                f"relevance: no label {target!r}; there is {', '.join(labels[:8]) or 'none: give a number'}"
            )
        target = labels.index(target)
    if not 0 <= target < len(logits):
        raise ValueError(f"relevance: no output {target}; the outputs are 0 to {len(logits) - 1}")
    return logits[target]


def _refuse(target: Any, at: int | None, why: str) -> None:
    if target is not None or at is not None:
        raise ValueError(f"relevance: {why}: leave out {'at' if target is None else 'target'}")
