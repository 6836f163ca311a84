"""The contract suite: what every mixer promises, as small claims that can fail. Run it on a mixer of your own:

    headway.testing.check_mixer("my_package.my_mixer", heads=4)

A claim is left out only where the mixer's `CAN` says that it does not apply; that `CAN` is true is itself a claim.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor

from headway import mixers
from headway.attend import forced, listening
from headway.machine import kept_for_the_way_back
from headway.mask import Mask
from headway.mixers import Cost
from headway.positions import build_positions, positions_of
from headway.spec import PositionSpec, convert
from headway.state import State

ROWS, LENGTH, CONTEXT = 3, 7, 5
LENGTHS, CONTEXT_LENGTHS = (7, 4, 1), (5, 3, 1)  # of each row, where rows are padded
SEGMENTS, CONTEXT_SEGMENTS = (4, 3), (2, 3)  # lengths of two sequences that fill one row together
CHUNKS = ((1,) * LENGTH, (3, 1, 2, 1), (LENGTH,))
REORDERED = (2, 0, 0, 1)


def check_mixer(
    name: str, *, width: int = 16, positions: str = "rotary", compiled: bool = False, **options: Any
) -> list[str]:
    """Checks one mixer, by its name or by the dotted path of a module, and returns the names of the claims that held.

    `options` are the mixer's own; `positions` is the scheme that its stack would give it. `compiled` adds the claim
    that `torch.compile` changes nothing, which takes long. The first broken claim is an AssertionError of one line.
    """
    if "." in name:
        importlib.import_module(name)
    held = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        subject = Subject({"name": name, **options}, width, positions)
        facts = subject.facts() | ({"compiled"} if compiled else set())
        for claim, needs in CLAIMS.items():
            if needs <= facts:
                try:
                    claim(subject)
                except Exception as error:
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                    line = " ".join(str(error).split())
                    raise AssertionError(f"{name}: {claim.__name__}: {kind}{line}") from error
                held.append(claim.__name__)
    return held


class Subject:
    """The mixer under test and the ways to call it."""

    def __init__(self, named: dict[str, Any], width: int, positions: str) -> None:
        self.named, self.width = named, width
        scheme = convert({"name": positions}, PositionSpec, "positions")
        self.positions = build_positions(scheme, width, mixers.head_dim(named, width))
        self.mixer = mixers.build(named, width, self.positions).eval()
        self.call: Callable[..., Tensor] = self.mixer
        self.can = self.mixer.can
        self.directions = [mask for mask in (Mask(causal=True), Mask()) if mask.facts <= self.can]

    def facts(self) -> frozenset[str]:
        """What decides which claims apply: `can`, and whether it mixes tokens, and whether it calls `attend`."""
        with listening() as heard, suppress(Exception):  # the claims will tell
            for mask, context in self.uses(plain=True):
                self(self.tokens(), mask, context=context)
        more = {"self": self.directions, "ordered": self.can & {"causal", "cross"}, "attend": bool(heard)}
        return self.can | {fact for fact, holds in more.items() if holds}

    def uses(self, plain: bool = False) -> list[tuple[Mask, Tensor | None]]:
        """All that it can do, a mask with the context that it is over or None; `plain`: with nothing masked."""
        own = [(mask, None) for mask in _examples() if mask.facts <= self.can]
        over = [
            (mask, self.tokens(ROWS, CONTEXT))
            for mask in _context_examples()
            if mask.facts - {"bidirectional"} | {"cross"} <= self.can
        ]
        return [(mask, c) for mask, c in own + over if not plain or mask.facts <= {"causal", "bidirectional"}]

    def tokens(self, rows: int = ROWS, length: int = LENGTH) -> Tensor:
        return torch.randn(rows, length, self.width)

    def __call__(
        self,
        x: Tensor,
        mask: Mask,
        pos: Tensor | None = None,
        state: State | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        if pos is None:
            pos = positions_of(mask.valid if context is None else None, x.shape[0], x.shape[1], x.device)
        return self.call(x, mask=mask, pos=pos, state=state, context=context)

    def cost(self, length: int, mask: Mask, context_length: int | None = None) -> Cost:
        """What it states; where its two directions differ in cost, `cost` takes `causal` besides."""
        if "causal" in inspect.signature(self.mixer.cost).parameters:
            return self.mixer.cost(length, context_length, causal=mask.causal)  # type: ignore[call-arg]
        return self.mixer.cost(length, context_length)

    def stream(self, x: Tensor, pos: Tensor, chunks: tuple[int, ...], state: State) -> Tensor:
        """The outputs of a stream of chunks; a chunk is told of its own padding only, and only where it has some."""
        outputs = []
        for tokens, places in zip(x.split(chunks, 1), pos.split(chunks, 1), strict=True):
            valid = None if bool((places >= 0).all()) else places >= 0
            outputs.append(self(tokens, Mask(causal=True, valid=valid), places, state))
        return torch.cat(outputs, 1)


# --- The claims


def shape_and_type_are_kept(s: Subject) -> None:
    for mask in s.directions:
        for length in (1, LENGTH):
            x = s.tokens(length=length)
            y = s(x, mask)
            assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{x.shape} {x.dtype} became {y.shape} {y.dtype}"


def the_future_does_not_leak(s: Subject) -> None:
    for mask, context in s.uses(plain=True):
        if not mask.causal and context is None:
            continue
        x = s.tokens().requires_grad_()
        y = s(x, mask, context=context)
        for cut in range(1, LENGTH):
            changed = torch.cat([x[:, :cut], s.tokens(length=LENGTH - cut)], 1)
            where = f"tokens from {cut} on changed, and an earlier output did, under {_name(mask, context)}"
            _close(s(changed, mask, context=context)[:, :cut], y[:, :cut], where, 1e-6)
        leak = _influence(x, y).triu(1)
        assert not leak.any(), f"under {_name(mask, context)}, {_first(leak)} has a gradient and lies in the future"


def masks_are_honoured(s: Subject) -> None:
    """No gradient flows from an output to what the mask hides from it."""
    uses = s.uses()
    if "causal" in s.can:
        uses.append((reduce(and_, (mask for mask, context in uses if mask.causal)), None))
    for mask, context in uses:
        x = s.tokens().requires_grad_()
        pos = positions_of(mask.valid if context is None else None, ROWS, LENGTH, x.device)
        if context is None:
            hidden = _influence(x, s(x, mask)) & ~mask.allows(pos, pos) & (pos >= 0)[..., None]
            leak = hidden & ~torch.eye(LENGTH, dtype=torch.bool, device=x.device)  # a token always knows itself
        else:
            context.requires_grad_()
            leak = _influence(context, s(x, mask, context=context)) & ~mask.allows(pos, torch.arange(CONTEXT)[None])
        assert not leak.any(), f"under {_name(mask, context)}, {_first(leak)} has a gradient and is masked"


def padding_changes_nothing(s: Subject) -> None:
    for mask in s.directions:
        for left in (False, True):
            valid = _valid(LENGTHS, LENGTH, left)
            x = s.tokens() * torch.where(valid, 1, 1e3)[..., None]
            y = s(x, mask & Mask(valid=valid))
            for row, there in enumerate(valid):
                alone = s(x[row : row + 1, there], mask)[0]
                _close(y[row, there], alone, f"padded on the {'left' if left else 'right'}, under {_name(mask)}")


def packing_changes_nothing(s: Subject) -> None:
    x = s.tokens()
    segments = _segments(SEGMENTS)
    pos = torch.cat([torch.arange(size) for size in SEGMENTS]).expand(ROWS, -1)
    for mask in s.directions:
        alone = torch.cat([s(part, mask) for part in x.split(SEGMENTS, 1)], 1)
        _close(s(x, mask & Mask(segments=segments), pos), alone, f"packed, under {_name(mask)}")


def streamed_equals_parallel(s: Subject) -> None:
    x = s.tokens()
    with torch.no_grad():
        for valid in (None, _valid(LENGTHS, LENGTH, left=True)) if "padding" in s.can else (None,):
            pos = positions_of(valid, ROWS, LENGTH, x.device)
            parallel = s(x, Mask(causal=True, valid=valid))
            for chunks in CHUNKS:
                for capacity in (LENGTH, 2):  # a hint that is too small is no error
                    y = s.stream(x, pos, chunks, s.mixer.init_state(ROWS, capacity))
                    how = f"in chunks of {chunks}{'' if valid is None else ', padded on the left'}"
                    _close(y[pos >= 0], parallel[pos >= 0], how)


def state_reorders(s: Subject) -> None:
    rows, seen = torch.tensor(REORDERED), LENGTH - 3
    start, rest = s.tokens(length=seen), s.tokens(len(REORDERED), 3)
    pos = torch.arange(LENGTH)[None]
    with torch.no_grad():
        state = s.mixer.init_state(ROWS, LENGTH)
        s.stream(start, pos[:, :seen].expand(ROWS, -1), (seen,), state)
        state.reorder(rows)
        y = s.stream(rest, pos[:, seen:].expand(len(rows), -1), (1, 2), state)
        whole = s(torch.cat([start[rows], rest], 1), Mask(causal=True))
    _close(y, whole[:, seen:], f"rows reordered as {REORDERED}")


def state_bytes_are_as_stated(s: Subject) -> None:
    if "causal" in s.can:
        for length in (2, LENGTH):
            state = s.mixer.init_state(1, length)
            with torch.no_grad():
                s.stream(s.tokens(1, length), torch.arange(length)[None], (1,) * length, state)
            stated = s.mixer.cost(length).state_bytes
            assert state.nbytes == stated, f"{state.nbytes} bytes after {length} tokens, and cost() says {stated}"
    if "cross" in s.can:
        state = s.mixer.init_state(1, CONTEXT, cross=True)
        with torch.no_grad():
            s(s.tokens(1), Mask(), state=state, context=s.tokens(1, CONTEXT))
        stated = s.mixer.cost(LENGTH, CONTEXT).state_bytes
        assert state.nbytes == stated, f"{state.nbytes} bytes of a context of {CONTEXT}, and cost() says {stated}"


def fast_equals_reference(s: Subject) -> None:
    """The kernel that `attend` chooses gives what its definition gives, gradients included."""
    for mask, context in s.uses():
        x = s.tokens()
        fast = _with_gradients(s, x, mask, context)
        with forced("reference"):
            slow = _with_gradients(s, x, mask, context)
        for part in slow:
            _close(fast[part], slow[part], f"{part}, under {_name(mask, context)}")


def compiled_equals_eager(s: Subject) -> None:
    for mask, context in s.uses(plain=True):
        x = s.tokens()
        eager = _with_gradients(s, x, mask, context)
        s.call = torch.compile(s.mixer)
        compiled = _with_gradients(s, x, mask, context)
        s.call = s.mixer
        for part in eager:
            _close(compiled[part], eager[part], f"{part}, under {_name(mask, context)}")


def every_parameter_gets_a_gradient(s: Subject) -> None:
    for mask, context in s.uses(plain=True):
        s.mixer.zero_grad()
        y = s(s.tokens().requires_grad_(), mask, context=context)  # a mixer may have no parameter
        (y * torch.randn_like(y)).sum().backward()
        for name, parameter in s.mixer.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets none, under {_name(mask, context)}"
                assert parameter.grad.isfinite().all(), f"that of {name} is not finite, under {_name(mask, context)}"


def can_is_true(s: Subject) -> None:
    """What `CAN` leaves out is refused with a ValueError; what it lists runs."""
    assert s.directions or "cross" in s.can, "CAN names none of causal, bidirectional and cross"
    for mask in _examples():
        _runs(s, mask, None, mask.facts <= s.can)
        if mask.facts & {"causal", "window"}:  # these compare positions, and those of a context are its own
            _runs(s, mask, s.tokens(), False)
    for mask in _context_examples():
        _runs(s, mask, s.tokens(ROWS, CONTEXT), mask.facts - {"bidirectional"} | {"cross"} <= s.can)
    if s.directions and "stream" not in s.can:
        try:
            s(s.tokens(), s.directions[0], state=s.mixer.init_state(ROWS, LENGTH))
        except ValueError:
            return
        raise AssertionError("stream is not in CAN and was not refused with a ValueError")


def flops_are_as_stated(s: Subject) -> None:
    """Counted in the plain forms: PyTorch's counter is blind to the fused CPU kernels of attention and of an LSTM."""
    from torch.utils.flop_counter import FlopCounterMode  # which loads Triton

    for mask, context in s.uses(plain=True):
        context = None if context is None else context[:1]
        counter = FlopCounterMode(display=False)
        blind = torch.backends.mkldnn.flags(enabled=False)
        with warnings.catch_warnings(action="ignore"), blind, forced("reference"), counter:
            s(s.tokens(1), mask, context=context)
        counted, stated = counter.get_total_flops(), s.cost(LENGTH, mask, None if context is None else CONTEXT).flops
        assert counted == stated, f"{counted} under {_name(mask, context)}, and cost() says {stated}"


def activations_are_as_stated(s: Subject) -> None:
    """What autograd keeps for the way back, of one row, weights left out; within a quarter and a few small tensors."""
    length = 64  # long enough for the growth to show
    for mask, context in s.uses(plain=True):
        context = None if context is None else s.tokens(1, length)
        x = s.tokens(1, length).requires_grad_()
        blind = torch.backends.mkldnn.flags(enabled=False)  # the plain forms, as above
        own = [*s.mixer.parameters(), *s.mixer.buffers()]
        with warnings.catch_warnings(action="ignore"), blind, kept_for_the_way_back(own) as kept:
            y = s(x, mask, context=context)
        assert y.requires_grad, "the output has no gradient"
        held, stated = sum(kept.values()), s.cost(length, mask, None if context is None else length).activation_bytes
        slack = 0.25 * held + 8 * length * s.width
        assert abs(held - stated) <= slack, f"{held} under {_name(mask, context)}, and cost() says {stated}"


def options_survive_json(s: Subject) -> None:
    kind, chosen = mixers.options(s.named)
    again = {"name": s.named["name"], **json.loads(json.dumps(chosen))}
    assert mixers.options(again) == (kind, chosen), f"{chosen} came back as {mixers.options(again)[1]}"
    twin = Subject(again, s.width, "none")
    twin.mixer.load_state_dict(s.mixer.state_dict())


def context_padding_changes_nothing(s: Subject) -> None:
    x = s.tokens()
    for left in (False, True):
        valid = _valid(CONTEXT_LENGTHS, CONTEXT, left)
        context = s.tokens(ROWS, CONTEXT) * torch.where(valid, 1, 1e3)[..., None]
        y = s(x, Mask(valid=valid), context=context)
        for row, there in enumerate(valid):
            alone = s(x[row : row + 1], Mask(), context=context[row : row + 1, there])[0]
            _close(y[row], alone, f"context padded on the {'left' if left else 'right'}")


def context_is_written_once(s: Subject) -> None:
    """A stream reads the context at its first call and never again; `reorder` moves what it kept."""
    x, context = s.tokens(), s.tokens(ROWS, CONTEXT)
    rows, gone = torch.tensor(REORDERED), torch.full_like(context, torch.nan)
    pos = torch.arange(LENGTH).expand(ROWS, -1)
    for valid in (None, _valid(CONTEXT_LENGTHS, CONTEXT, left=False)) if "padding" in s.can else (None,):
        with torch.no_grad():
            mask, state = Mask(valid=valid), s.mixer.init_state(ROWS, CONTEXT, cross=True)
            whole = s(x, mask, context=context)
            first = s(x[:, :1], mask, pos[:, :1], state, context)
            rest = [s(x[:, i : i + 2], mask, pos[:, i : i + 2], state, gone) for i in range(1, LENGTH, 2)]
            _close(torch.cat([first, *rest], 1), whole, "token by token")
            state.reorder(rows)
            mask = Mask(valid=None if valid is None else valid[rows])
            _close(s(x[rows], mask, pos[rows], state, gone[rows]), whole[rows], f"rows reordered as {REORDERED}")


CLAIMS: dict[Callable[[Subject], None], set[str]] = {  # each with the facts about a mixer that make it apply
    can_is_true: set(),
    options_survive_json: set(),
    shape_and_type_are_kept: {"self"},
    the_future_does_not_leak: {"ordered"},
    masks_are_honoured: set(),
    padding_changes_nothing: {"self", "padding"},
    packing_changes_nothing: {"self", "segments"},
    streamed_equals_parallel: {"causal", "stream"},
    state_reorders: {"causal", "stream"},
    state_bytes_are_as_stated: {"stream"},
    context_padding_changes_nothing: {"cross", "padding"},
    context_is_written_once: {"cross", "stream"},
    fast_equals_reference: {"attend"},
    every_parameter_gets_a_gradient: set(),
    flops_are_as_stated: set(),
    activations_are_as_stated: set(),
    compiled_equals_eager: {"compiled"},
}


# --- What the claims are made of


def _examples() -> list[Mask]:
    """Each fact a mask can state, under both directions."""
    ring = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    ring[:, 2] = True
    facts = [
        Mask(),
        Mask(valid=_valid(LENGTHS, LENGTH, left=False)),
        Mask(valid=_valid(LENGTHS, LENGTH, left=True)),
        Mask(segments=_segments(SEGMENTS)),
        Mask(window=(2, 1)),
        Mask(window=(1, 0), sinks=1),
        Mask(window=(1, 0), globals=ring),
    ]
    prefixes = [Mask(causal=True, prefix=3), Mask(causal=True, prefix=torch.tensor([3, 0, 2]))]
    return [*(mask & Mask(causal=causal) for causal in (True, False) for mask in facts), *prefixes]


def _context_examples() -> list[Mask]:
    """What a mask over a context can state."""
    return [
        Mask(),
        Mask(valid=_valid(CONTEXT_LENGTHS, CONTEXT, left=False)),
        Mask(segments=_segments(SEGMENTS), key_segments=_segments(CONTEXT_SEGMENTS)),
    ]


def _valid(lengths: tuple[int, ...], size: int, left: bool) -> Tensor:
    there = torch.arange(size)[None] < torch.tensor(lengths)[:, None]
    return there.flip(1) if left else there


def _segments(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand(ROWS, -1)


def _name(mask: Mask, context: Tensor | None = None) -> str:
    return ", ".join(sorted(mask.facts if context is None else mask.facts - {"bidirectional"} | {"cross"}))


def _first(pairs: Tensor) -> str:
    row, query, key = (int(i) for i in pairs.nonzero()[0])
    return f"query {query} to key {key} of row {row}"


def _close(got: Tensor, want: Tensor, where: str, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape, f"{where}: {tuple(got.shape)} and not {tuple(want.shape)}"
    got, want = got.detach(), want.detach()
    off, allowed = float((got - want).abs().max()), tolerance * (1 + float(want.abs().max()))
    assert off <= allowed, f"{where}: off by {off:.3g} where {allowed:.3g} is allowed"  # a NaN fails this too


def _runs(s: Subject, mask: Mask, context: Tensor | None, should: bool) -> None:
    try:
        s(s.tokens(), mask, context=context)
    except ValueError as error:
        assert not should, f"{_name(mask, context)} is in CAN and was refused: {error}"
    else:
        assert should, f"{_name(mask, context)} is not in CAN and was not refused with a ValueError"


def _influence(x: Tensor, y: Tensor) -> Tensor:
    """`Bool[B T S]`: whether output t of a row has a gradient with respect to input s of that row."""
    probe = torch.randn_like(y)
    sums = [(y[:, t] * probe[:, t]).sum() for t in range(y.shape[1])]
    rows = [torch.autograd.grad(one, x, retain_graph=True, materialize_grads=True)[0] for one in sums]
    return torch.stack([(row != 0).any(-1) for row in rows], 1)


def _with_gradients(s: Subject, x: Tensor, mask: Mask, context: Tensor | None) -> dict[str, Tensor]:
    """The output where there are tokens, and the gradients of one fixed function of it."""
    x = x.clone().requires_grad_()
    y = s(x, mask, context=context)
    if context is None:
        y = y[positions_of(mask.valid, ROWS, LENGTH, x.device) >= 0]
    parts = {"input": x, **dict(s.mixer.named_parameters())}
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    found = torch.autograd.grad((y * weights).sum(), list(parts.values()), materialize_grads=True)
    return {"output": y, **{f"gradient of {part}": g for part, g in zip(parts, found, strict=True)}}
