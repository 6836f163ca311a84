"""A convolution as long as the sequence (2302.10866 and others): it sees everything too, at a price in parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Table, curves
from headway.compare.claims._layers import ATTENTION, Named, caller, dependence, drawn, layer
from headway.compare.growth import fit

SECTION = "B"
TITLE = "Seeing everything: attention, or one long kernel"
SAID = (
    "Attention and a convolution as long as the sequence both see all of it in one layer; the kernel's parameters "
    "grow with the length, attention's do not; the kernel's sums are cheaper, O(n log n) by Fourier transforms."
)
METHOD = "Non-zero entries of a causal layer's Jacobian; parameters counted against their formulas; stated operations."
RULE = (
    "It holds where every earlier token matters to every later one in both and none later, counted parameters equal "
    "4 d² (attention), n d + 3 d² + 4 d (one kernel a channel) and 2 n d² + d² + 3 d (full kernel) at every length, "
    "and operations grow slower for the kernel a channel than for attention; in part where all but the last is so."
)
SECONDS = (2.0, 10.0)
WIDTH = 16
SLIGHT = 1e-12  # of the largest entry: what Fourier transforms leave where there should be nothing


def kinds(length: int) -> dict[str, Named]:
    conv = {"name": "conv", "kernel": length}
    return {
        "attention": ATTENTION,
        "long kernel, one a channel": {**conv, "depthwise": True},
        "long kernel, full": conv,
    }


def formulas(n: int, d: int) -> dict[str, int]:
    return dict(zip(kinds(n), (4 * d * d, n * d + 3 * d * d + 4 * d, 2 * n * d * d + d * d + 3 * d), strict=True))


def measure(how: How) -> Found:
    """Reach and parameters at some lengths, operations at more."""
    lengths = (16, 32, 64) if how.quick else (16, 32, 64, 128)
    rows, right, sees = [], True, True
    for i, n in enumerate(lengths):
        how.tell(f"{n} tokens", i / len(lengths))
        for title, named in kinds(n).items():
            net = layer(named, WIDTH, seed=how.seed).double()
            reach = share_seen(dependence(caller(net, True), drawn(1, n, WIDTH, how.seed).double()))
            counted, said = sum(p.numel() for p in net.parameters()), formulas(n, WIDTH)[title]
            sees, right = sees and reach == (1.0, 0.0), right and counted == said
            rows.append((f"{title}, {n} tokens", 100 * reach[0], 100 * reach[1], counted, said))
    far = [2**i for i in range(8, 15)]
    flops = {t: {n: float(layer(kinds(n)[t], WIDTH).cost(n).flops) for n in far} for t in list(kinds(1))[:2]}
    grows = {t: found.exponent for t, curve in flops.items() if (found := fit(curve)) is not None}
    cheaper = grows["long kernel, one a channel"] < grows["attention"]
    weights = {t: {n: float(formulas(n, WIDTH)[t]) for n in far} for t in kinds(1)}
    both = " and ".join(f"n^{b:.2f} ({t})" for t, b in grows.items())
    return Found(
        verdict=(HOLDS if cheaper else PARTLY) if sees and right else FAILS,
        because=f"{'Every' if sees else 'Not every'} earlier token reaches every later one in one layer of each; "
        f"parameters are {'as' if right else 'not as'} the formulas say; operations grow as {both}.",
        tables=(
            Table(
                title=f"One causal layer of width {WIDTH}",
                columns=(
                    "",
                    "earlier pairs that matter, %",
                    "later pairs that matter, %",
                    "parameters",
                    "by the formula",
                ),
                rows=tuple(rows),
            ),
        ),
        plots=(
            curves(
                "Parameters of a layer",
                "A kernel has weights for each distance; attention none.",
                "tokens",
                "parameters",
                weights,
            ),
            curves(
                "Operations of a layer",
                "The steeper line is attention, which weighs all pairs.",
                "tokens",
                "operations",
                flops,
            ),
        ),
        settings={
            "width": WIDTH,
            "lengths": lengths,
            "seed": how.seed,
            "counted as nothing": f"{SLIGHT} of the largest",
        },
    )


def share_seen(found: Tensor) -> tuple[float, float]:
    """The share of pairs (output, input not behind it) that matter, and of pairs (output, input behind it)."""
    matters, before = found > SLIGHT * found.max(), torch.ones_like(found, dtype=torch.bool).tril()
    return float(matters[before].double().mean()), float(matters[~before].double().mean())
