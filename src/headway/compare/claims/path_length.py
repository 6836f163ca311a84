"""Path length: how many layers lie between two tokens (table 1 of 1706.03762), read off Jacobians."""

from __future__ import annotations

import math

import torch

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._layers import (
    ATTENTION,
    CONV,
    LSTM,
    SSM,
    Named,
    caller,
    causal,
    dependence,
    drawn,
    own,
    stack,
)

SECTION = "A"
TITLE = "The way between two tokens"
SAID = (
    "Attention joins any two tokens in one step; a recurrent layer takes as many steps as they are apart; "
    "convolutions take O(n) layers, or O(log n) where each reaches twice as far as the one below."
)
METHOD = (
    "The fewest layers at which the Jacobian d output / d input is not exactly zero, for each distance, in float64."
)
RULE = (
    "It holds where attention and the LSTM need one layer at every distance, kernels of 3 need exactly as many as "
    "tokens between, and doubling ones exactly ceil(log2(distance + 1)); in part where attention alone is as said."
)
SECONDS = (6.0, 90.0)
DOUBLING, STACKED = "convolutions of 3, doubling", "convolutions of 3"
WIDTH, DEPTH = 8, 4  # DEPTH: of the stacks whose decay is shown


def measure(how: How) -> Found:
    """Layers needed by distance, and how a stack's dependence fades with distance."""
    far = 64 if how.quick else 256
    distances = [2**i for i in range(far.bit_length())]
    few = {"attention": ATTENTION, "LSTM": LSTM, "state space": SSM, STACKED: CONV, **own(how.mixers)}
    needed, faded = {}, {}
    for i, title in enumerate([*few, DOUBLING]):
        how.tell(title, i / (len(few) + 1))
        needed[title] = fewest(few.get(title), distances, how.seed)
        faded[title] = fading(blocks_of(few.get(title), DEPTH), far, how.seed)
    said = {
        "attention": [1] * len(distances),
        "LSTM": [1] * len(distances),
        STACKED: distances,
        DOUBLING: [math.ceil(math.log2(d + 1)) for d in distances],
    }
    right = [title for title, layers in said.items() if needed[title] == layers]
    verdict = HOLDS if len(right) == len(said) else PARTLY if "attention" in right else FAILS
    ways = ", ".join(f"{title} needs {words(layers[-1])}" for title, layers in needed.items())
    return Found(
        verdict=verdict,
        because=f"To a token {far} away {ways}; inside its one layer the LSTM hands its state on {far} times.",
        tables=(
            Table(
                title="Layers needed, by distance in tokens",
                columns=("", *(f"{d}" for d in distances)),
                rows=tuple((title, *layers) for title, layers in needed.items()),
            ),
        ),
        plots=plots(distances, needed, faded),
        notes=("Weights are those that training starts from; it changes how much arrives, not the layers needed.",),
        settings={"width": WIDTH, "distances": distances, "depth of the stacks shown": DEPTH, "seed": how.seed},
    )


def plots(distances: list[int], needed: dict[str, list[int | None]], faded: dict[str, list[float]]) -> tuple[Plot, ...]:
    reached = {
        title: tuple((float(d), float(n)) for d, n in zip(distances, layers, strict=True) if n is not None)
        for title, layers in needed.items()
    }
    return (
        Plot(
            title="Layers needed",
            sentence="Flat is attention's one step; the straight rise is a stack of short kernels, a layer a token.",
            x="tokens apart",
            y="layers",
            lines=tuple(Line(name=title, points=points) for title, points in reached.items()),
            log_x=True,
            log_y=True,
        ),
        Plot(
            title=f"How much arrives through {DEPTH} layers",
            sentence="A line that falls forgets with distance; one that ends reaches no further.",
            x="tokens apart",
            y="size of the Jacobian",
            lines=tuple(Line(name=t, points=tuple(enumerate(sizes))[1:]) for t, sizes in faded.items()),
            log_x=True,
            log_y=True,
        ),
    )


def blocks_of(named: Named | None, depth: int) -> list[Named]:
    """`depth` equal layers, or kernels whose steps double where none is named."""
    return [{**CONV, "dilation": 2**i} if named is None else named for i in range(depth)]


def fading(blocks: list[Named], far: int, seed: int) -> list[float]:
    """How much the last of far + 1 tokens depends on the one `distance` before it, by distance."""
    net = stack(blocks, WIDTH, seed=seed).double()
    x = drawn(1, far + 1, WIDTH, seed).double()
    return dependence(caller(net, causal(blocks[0])), x, slice(far, None))[0].flip(0).tolist()


def fewest(named: Named | None, distances: list[int], seed: int) -> list[int | None]:
    """The fewest layers that reach each distance; None where as many as tokens do not."""
    found: dict[int, int] = {}
    for depth in range(1, distances[-1] + 1):
        sizes = fading(blocks_of(named, depth), distances[-1], seed)
        found |= {d: depth for d in distances if sizes[d] != 0 and d not in found}
        if len(found) == len(distances) or (depth > 1 and not any(torch.tensor(sizes[1:]))):
            break
    return [found.get(d) for d in distances]


def words(layers: int | None) -> str:
    return "more layers than tokens" if layers is None else f"{layers} layer{'' if layers == 1 else 's'}"
