"""Self- and cross-attention: what each output depends on, what masks hide, and that both have the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.compare.claims import FAILS, HOLDS, Found, How, Table
from headway.compare.claims._layers import Call, caller, drawn, layer
from headway.mask import Mask
from headway.mixers import Mixer
from headway.positions import positions_of
from headway.probe.influence import norms

SECTION = "C"
TITLE = "What self- and cross-attention depend on"
SAID = (
    "Self-attention reads its own sequence, under a causal mask only what came before; cross-attention asks from one "
    "sequence and reads all of another, save its padding. Both have the same parameters."
)
METHOD = "Entries of the Jacobian of one layer that are not exactly zero, in float64, as shares of each kind of pair."
RULE = "It holds where every share is exactly 100% or 0%, as said, and both layers have 4 d² parameters."
SECONDS = (1.0, 10.0)
WIDTH, TARGET, SOURCE, PADDED = 16, 12, 16, 4
NAMED = {"name": "attention", "heads": 2}


def measure(how: How) -> Found:
    """Four kinds of call, a table row a kind of pair."""
    net = layer(NAMED, WIDTH, seed=how.seed).double()
    x, context = drawn(1, TARGET, WIDTH, how.seed).double(), drawn(1, SOURCE, WIDTH, how.seed + 1).double()
    future = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
    same = torch.eye(TARGET, dtype=torch.bool)
    both, past = matters(caller(net, False), x, TARGET), matters(caller(net, True), x, TARGET)
    own = matters(crossing(net, context=context), x, TARGET)
    read = matters(crossing(net, x=x), context, TARGET)
    hidden = torch.arange(SOURCE) >= SOURCE - PADDED
    part = matters(crossing(net, x=x, valid=~hidden[None]), context, TARGET)
    pairs: list[tuple[str, str, Tensor, float]] = [
        ("self-attention", "any token of its own", both, 100.0),
        ("causal self-attention", "itself and what came before", past[~future], 100.0),
        ("causal self-attention", "what is to come", past[future], 0.0),
        ("cross-attention", "its own token, which asks", own[same], 100.0),
        ("cross-attention", "other tokens of its own sequence", own[~same], 0.0),
        ("cross-attention", "any token of the other sequence", read, 100.0),
        ("cross-attention, padded", "tokens of the other sequence", part[:, ~hidden], 100.0),
        ("cross-attention, padded", "padding of the other sequence", part[:, hidden], 0.0),
    ]
    rows = [(kind, of, 100 * float(found.double().mean()), said) for kind, of, found, said in pairs]
    count, formula = sum(p.numel() for p in net.parameters()), 4 * WIDTH**2
    right = sum(found == said for _, _, found, said in rows)
    return Found(
        verdict=HOLDS if right == len(rows) and count == formula else FAILS,
        because=f"{right} of {len(rows)} kinds of pairs are exactly as said; the one layer served as both kinds, with "
        f"{count:,} parameters where the formula has {formula:,}.",
        tables=(
            Table(
                title="Pairs (output, input) that matter",
                columns=("", "on", "share, %", "as said, %"),
                rows=tuple(rows),
            ),
        ),
        notes=(
            "A causal mask lets outputs be made one after the other; the other sequence is there already, so it is "
            "read whole.",
        ),
        settings={"width": WIDTH, "own tokens": TARGET, "other tokens": SOURCE, "padding": PADDED, "seed": how.seed},
    )


def crossing(net: Mixer, x: Tensor | None = None, context: Tensor | None = None, valid: Tensor | None = None) -> Call:
    """The layer as a function of its tokens, given a context, or of the context, given tokens."""

    def call(given: Tensor) -> Tensor:
        rows = len(given)
        ours, theirs = (t if t is not None else given for t in (x, context))
        mask = Mask() if valid is None else Mask(valid=valid.expand(rows, -1))
        ours, theirs = ours.expand(rows, -1, -1), theirs.expand(rows, -1, -1)
        return net(ours, mask=mask, pos=positions_of(None, rows, ours.shape[1], ours.device), context=theirs)

    return call


def matters(call: Callable[[Tensor], Tensor], x: Tensor, outputs: int) -> Tensor:
    """Which inputs each output depends on at all, `Bool[T S]`."""
    with torch.enable_grad():
        return norms(call, x, outputs, None, "exact", None).map != 0
