"""Content: whether what a token takes from others depends on what they say, or only on where they stand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headway.compare.claims import FAILS, HOLDS, Found, How, Line, Plot, Table
from headway.compare.claims._layers import ATTENTION, LSTM, SSM, Named, caller, dependence, drawn, layer, own
from headway.mask import Mask
from headway.positions import positions_of

SECTION = "B"
TITLE = "Weights that depend on the content"
SAID = "Attention's weights are made from the tokens themselves; a convolution's are the same for every input."
METHOD = (
    "The map by which a layer mixes tokens, and its Jacobian, at pairs of random inputs: |A - B| / |A + B|, each row "
    "made to sum to one; 0 is the same map, 1 has nothing in common."
)
RULE = "It holds where the convolution's map does not change at all and attention's changes by 0.05 or more."
SECONDS = (2.0, 10.0)
WIDTH, LENGTH = 16, 24


def kinds() -> dict[str, Named]:
    conv = {"name": "conv", "kernel": LENGTH, "depthwise": True}
    return {
        "attention": ATTENTION,
        "long kernel": {**conv, "gated": False},
        "long kernel, gated": conv,
        "average": {"name": "average"},
        "LSTM": LSTM,
        "state space": SSM,
    }


def measure(how: How) -> Found:
    """Changes of maps and Jacobians over pairs of inputs, for each mixer."""
    pairs, few = (6 if how.quick else 30), {**kinds(), **own(how.mixers)}
    maps, slopes = {}, {}
    for i, (title, named) in enumerate(few.items()):
        how.tell(title, i / len(few))
        net = layer(named, WIDTH, seed=how.seed).double()
        one_way = "causal" in net.can
        inputs = [drawn(1, LENGTH, WIDTH, how.seed + k).double() for k in range(pairs + 1)]
        seen = [mixing(net, x, one_way) for x in inputs]
        maps[title] = None if seen[0] is None else spread([changed(a, b) for a, b in pairwise(seen)])  # type: ignore[arg-type]
        felt = [dependence(caller(net, one_way), x) for x in inputs]
        slopes[title] = spread([changed(a, b) for a, b in pairwise(felt)])
    first, second = maps["attention"], maps["long kernel"]
    assert first is not None and second is not None
    rows = tuple((t, None if (m := maps[t]) is None else m[0], slopes[t][0]) for t in few)
    ranges = {f"{r},{c}": found[1:] for r, t in enumerate(few) for c, found in ((1, maps[t]), (2, slopes[t])) if found}
    return Found(
        verdict=HOLDS if second[2] == 0 and first[1] >= 0.05 else FAILS,
        because=f"Between two inputs attention's map changes by {first[0]:.2f}, the kernel's by "
        f"{second[0]:.2g}; the Jacobian "
        f"of either changes ({slopes['attention'][0]:.2g} and {slopes['long kernel'][0]:.2g}), as activations bend it.",
        tables=(
            Table(
                title="Change between two inputs, 0 to 1",
                columns=("", "of the map", "of the Jacobian"),
                rows=rows,
                spread=ranges,
            ),
        ),
        plots=(
            Plot(
                title="Map against Jacobian",
                sentence="To the left are layers whose weights do not read; higher up are those whose answer bends "
                "with the input, which any curved function's does.",
                x="change of the map",
                y="change of the Jacobian",
                kind="dots",
                lines=tuple(Line(name=t, points=((m[0], slopes[t][0]),)) for t in few if (m := maps[t]) is not None),
            ),
        ),
        notes=("Weights are untrained. What forms no map (an LSTM) has only a Jacobian.",),
        settings={"width": WIDTH, "length": LENGTH, "pairs": pairs, "seed": how.seed},
    )


@torch.no_grad()
def mixing(net: Any, x: Tensor, one_way: bool) -> Tensor | None:
    """The weights of a layer's tokens, `Float[T T]`, averaged over heads; None of what tells none."""
    how: dict[str, Any] = {"mask": Mask(causal=one_way), "pos": positions_of(None, 1, x.shape[1], x.device)}
    if hasattr(net, "glance"):
        return net.glance(x, **how).rows(slice(None))[0].mean(0).double()
    return net.implied(x, **how).map[0].mean(0).double() if hasattr(net, "implied") else None


def changed(one: Tensor, two: Tensor) -> float:
    """|A - B| / |A + B| with rows that sum to one: 0 where equal, 1 where they share nothing."""
    a, b = (m.abs() / m.abs().sum(1, keepdim=True).clamp(min=1e-300) for m in (one, two))
    return float((a - b).abs().sum() / (a + b).sum())


def spread(values: list[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)
