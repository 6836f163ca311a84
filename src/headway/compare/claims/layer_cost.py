"""Cost of a layer: exponents of operations, time and memory in length n and width d (table 1 of 1706.03762)."""

from __future__ import annotations

from typing import Any

import torch

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table, curves
from headway.compare.claims._layers import (
    ATTENTION,
    CONV,
    LSTM,
    SSM,
    caller,
    causal,
    drawn,
    formed,
    kept_bytes,
    layer,
    own,
    power,
    seconds,
)
from headway.compare.growth import crossover, fit

SECTION = "A"
TITLE = "What a layer costs"
SAID = "Attention costs O(n² d), a recurrent layer O(n d²) with its projections, a convolution of k O(k n d²)."
METHOD = "Exponents fitted to operations (stated by the mixer, tested), to time forward, and to what training keeps."
NEAR = 0.2
EXPECTED = {"attention": (2.0, 1.0), "LSTM": (1.0, 2.0), "convolution of 3": (1.0, 2.0)}  # in n, in d
RULE = (
    f"It holds where the exponents of operations in n (far out, where n is above 16 d) and in d are within {NEAR:g} "
    "of what is said; in part where those in n are."
)
SECONDS = (8.0, 150.0)
FORMED = "attention, map formed"
WIDTH = 64


def measure(how: How) -> Found:
    """Curves by length at one width and by width at one length, and where attention stops being the cheapest."""
    lengths = [2**i for i in range(7, 12 if how.quick else 15)]
    widths = [32, 64, 128, 256] if how.quick else [32, 64, 128, 256, 512, 1024]
    few: dict[str, Any] = {
        "attention": ATTENTION,
        FORMED: ATTENTION,
        "LSTM": LSTM,
        "convolution of 3": CONV,
        "state space": SSM,
        **own(how.mixers),
    }
    found: dict[str, dict[str, dict[int, float]]] = {}
    for i, (title, named) in enumerate(few.items()):
        how.tell(title, i / len(few))
        whole = title == FORMED
        ns = [n for n in lengths if not whole or n <= 2048]
        far = [2**i for i in range(10, 21)]
        found[title] = {
            "flops in n": {n: float(flops(named, n, WIDTH)) for n in far},
            "flops in d": {d: float(flops(named, 2**18 if title in ("attention", FORMED) else 512, d)) for d in widths},
            "time in n": {n: timed(named, n, WIDTH, whole, how) for n in ns},
            "time in d": {d: timed(named, 512, d, whole, how) for d in widths},
            "kept in n": {n: float(kept(named, n, WIDTH, whole)) for n in ns},
        }
    b = {title: {key: fit(curve) for key, curve in curves.items()} for title, curves in found.items()}
    exponent = lambda title, key: round(b[title][key].exponent, 2)  # type: ignore[union-attr]
    in_n = all(abs(exponent(t, "flops in n") - n) <= NEAR for t, (n, _) in EXPECTED.items())
    in_d = all(abs(exponent(t, "flops in d") - d) <= NEAR for t, (_, d) in EXPECTED.items())
    first, keys = found["attention"]["time in n"], ("flops in n", "flops in d", "time in n", "time in d", "kept in n")
    crosses = {t: str(crossover(c["time in n"], first)) for t, c in found.items() if t not in ("attention", FORMED)}
    return Found(
        verdict=HOLDS if in_n and in_d else PARTLY if in_n else FAILS,
        because="; ".join(
            f"{t}: operations grow as {power('n', exponent(t, 'flops in n'))} {power('d', exponent(t, 'flops in d'))}"
            for t in EXPECTED
        )
        + f". What training keeps of attention grows as {power('n', exponent('attention', 'kept in n'))} by the "
        f"fused kernel, "
        f"as {power('n', exponent(FORMED, 'kept in n'))} where the map is formed. Faster than attention here: "
        + "; ".join(f"{t} {where}" for t, where in crosses.items())
        + ".",
        tables=(
            Table(
                title="Fitted exponents",
                columns=("", "operations in n", "operations in d", "time in n", "time in d", "kept in n"),
                rows=tuple((t, *(exponent(t, key) for key in keys)) for t in found),
            ),
            Table(
                title=f"Faster than attention, by tokens (width {WIDTH})",
                columns=("", "from or up to"),
                rows=tuple(crosses.items()),
            ),
        ),
        plots=(
            curves(
                "Time by length",
                f"Where a line crosses attention's, it begins to pay; width {WIDTH}, one row.",
                "tokens",
                "milliseconds",
                {t: {n: 1e3 * s for n, s in c["time in n"].items()} for t, c in found.items()},
            ),
            curves(
                "Kept for the way back",
                "Attention that forms its map keeps a number a pair; the fused kernel keeps none.",
                "tokens",
                "MiB",
                {t: {n: s / 2**20 for n, s in c["kept in n"].items()} for t, c in found.items()},
            ),
        ),
        notes=(
            "Time at short lengths and small widths is fixed cost, so its exponents stay below those of the "
            "operations.",
            "Operations of attention in d are counted where n is 2^18, so that its projections, n d², weigh little.",
        ),
        settings={"width": WIDTH, "lengths": lengths, "widths": widths, "seed": how.seed},
    )


def flops(named: dict[str, Any], length: int, width: int) -> int:
    return layer(named, width).cost(length).flops


def timed(named: dict[str, Any], length: int, width: int, whole: bool, how: How) -> float:
    """The least seconds of a call forward: what else the machine does only adds to it."""
    net = layer(named, width, seed=how.seed).to(how.device)
    call, x = caller(net, causal(named, width)), drawn(1, length, width).to(how.device)
    with torch.no_grad(), formed(whole):
        return seconds(lambda: call(x), 0.1 if how.quick else 1.0, how.device)[1]


def kept(named: dict[str, Any], length: int, width: int, whole: bool) -> int:
    net = layer(named, width)
    with torch.enable_grad(), formed(whole):
        return kept_bytes(caller(net, causal(named, width)), drawn(1, length, width), net)
