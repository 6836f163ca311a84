"""Order: whether a layer knows in which order its tokens stand, without and with positions."""

from __future__ import annotations

import torch

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table
from headway.compare.claims._layers import ATTENTION, CONV, Named, caller, drawn, stack

SECTION = "B"
TITLE = "Attention does not know the order"
SAID = "Without positions attention treats its tokens as a set; a convolution knows their order by itself."
METHOD = (
    "Tokens are shuffled before a layer, and outputs shuffled by itself: |f(P x) - P f(x)| / |f(x)|, in float64, "
    "over random orders. 0 is a layer blind to order."
)
BLIND, SEES = 1e-9, 1e-3
RULE = (
    f"It holds where the error is below {BLIND:g} for attention without positions, and above {SEES:g} for each scheme "
    "of positions and for the convolution; in part where the schemes do but one of the others does not."
)
SECONDS = (1.0, 10.0)
WIDTH, LENGTH = 16, 32
SCHEMES = ("learned", "sinusoidal", "rotary", "alibi", "buckets")


def measure(how: How) -> Found:
    """The error for each scheme, and for a convolution without any."""
    orders = 10 if how.quick else 100
    subjects: dict[str, tuple[Named, str, bool]] = {
        "attention, no positions": (ATTENTION, "none", False),
        "causal attention, no positions": (ATTENTION, "none", True),
        **{f"attention, {scheme}": (ATTENTION, scheme, False) for scheme in SCHEMES},
        "convolution of 3": (CONV, "none", False),
    }
    found = {}
    for i, (title, (named, scheme, one_way)) in enumerate(subjects.items()):
        how.tell(title, i / len(subjects))
        net = stack([named], WIDTH, scheme, how.seed).double()
        found[title] = errors(caller(net, one_way), orders, how.seed)
    mean = {title: sum(some) / len(some) for title, some in found.items()}
    schemes = all(mean[f"attention, {scheme}"] > SEES for scheme in SCHEMES)
    others = mean["attention, no positions"] < BLIND and mean["convolution of 3"] > SEES
    return Found(
        verdict=HOLDS if schemes and others else PARTLY if schemes else FAILS,
        because=f"Shuffling changes attention without positions by {mean['attention, no positions']:.1g}, with any "
        f"scheme by {min(mean[f'attention, {s}'] for s in SCHEMES):.2g} or more, the convolution by "
        f"{mean['convolution of 3']:.2g}. A causal mask alone tells the order too "
        f"({mean['causal attention, no positions']:.2g}).",
        tables=(
            Table(
                title="Error of equivariance under shuffling",
                columns=("", "error"),
                rows=tuple(mean.items()),
                spread={f"{r},1": (min(some), max(some)) for r, some in enumerate(found.values())},
            ),
        ),
        settings={"width": WIDTH, "length": LENGTH, "orders": orders, "seed": how.seed},
    )


@torch.no_grad()
def errors(call: object, orders: int, seed: int) -> list[float]:
    """|f(P x) - P f(x)| / |f(x)| of random orders P."""
    assert callable(call)
    random, found = torch.Generator().manual_seed(seed), []
    for k in range(orders):
        x, order = drawn(1, LENGTH, WIDTH, seed + k).double(), torch.randperm(LENGTH, generator=random)
        y = call(x)
        found.append(float((call(x[:, order]) - y[:, order]).norm() / y.norm()))
    return found
