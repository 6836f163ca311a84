"""The square root: why scores are divided by sqrt(d) (1706.03762, section 3.2.1)."""

from __future__ import annotations

import torch

from headway.compare.claims import FAILS, HOLDS, PARTLY, Found, How, Line, Plot, Table
from headway.compare.claims._trials import by_seed, hold, settings
from headway.compare.contest import RATES
from headway.compare.growth import fit
from headway.compare.trial import Trial

SECTION = "E"
TITLE = "Why scores are divided by √d"
SAID = "Undivided scores spread as √d, so the softmax of wide heads sees one key alone and its gradient vanishes."
METHOD = (
    "Scores of normal queries and keys, their softmax over 64 keys and its gradient; then MQAR is learned both ways."
)
RULE = (
    "It holds where undivided scores spread as d to the power 0.4 to 0.6, divided ones stay within 10% of 1, and the "
    "widest head learns 5 points less without division; in part where only training contradicts."
)
SECONDS = (30.0, 400.0)
KEYS = 64
Figures = tuple[float, float, float]  # spread of the scores, entropy of the softmax (1 is even), size of its gradient


def measure(how: How) -> Found:
    """Figures of the softmax by head width, and what is learned."""
    widths = (4, 16, 64, 256, 1024)
    plain = {d: softmax_figures(d, 1.0, how.seed) for d in widths}
    divided = {d: softmax_figures(d, d**-0.5, how.seed) for d in widths}
    dims, seeds = ((16, 256), 1) if how.quick else ((16, 64, 256, 1024), 3)
    trials = {
        f"heads of {d}, {name}, seed {how.seed + k}": trial(d, scale, how.seed + k, how.quick)
        for d in dims
        for name, scale in (("undivided", 1.0), ("divided", None))
        for k in range(seeds)
    }
    entries = hold(how, trials)
    learnt = by_seed(entries)
    mean = {t: sum(some) / len(some) for t, some in learnt.items()}
    grows = fit({d: plain[d][0] for d in widths})
    assert grows is not None
    even = all(0.9 <= divided[d][0] <= 1.1 for d in widths) and 0.4 <= grows.exponent <= 0.6
    gap = mean[f"heads of {dims[-1]}, divided"] - mean[f"heads of {dims[-1]}, undivided"]
    return Found(
        verdict=FAILS if not even else HOLDS if gap >= 5 else PARTLY,
        because=f"Undivided scores spread as d^{grows.exponent:.2f}, divided ones stay at "
        f"{divided[widths[-1]][0]:.2f}; at d = {widths[-1]:,} the softmax's gradient is "
        f"{plain[widths[-1]][2] / divided[widths[-1]][2]:.1%} of what it is divided. Heads of {dims[-1]} learn "
        f"{gap:+.1f} points by the division.",
        tables=(
            Table(
                title=f"Softmax over {KEYS} keys",
                columns=(
                    "head width",
                    "spread of scores",
                    "divided",
                    "entropy, 1 is even",
                    "divided",
                    "gradient",
                    "divided",
                ),
                rows=tuple((f"{d:,}", *(pair[d][i] for i in range(3) for pair in (plain, divided))) for d in widths),
            ),
            Table(
                title="MQAR learned, %",
                columns=("", "accuracy"),
                rows=tuple((t, round(value, 1)) for t, value in mean.items()),
                spread={f"{i},1": (min(some), max(some)) for i, some in enumerate(learnt.values())},
            ),
        ),
        plots=(
            curves(
                "Entropy of the softmax",
                "Undivided, wide heads look at one key alone before they have learnt which.",
                "entropy, 1 is even",
                1,
                plain,
                divided,
            ),
            curves(
                "Gradient through the softmax",
                "Where the softmax is sure, hardly any gradient is left to change its mind.",
                "size of the gradient",
                2,
                plain,
                divided,
            ),
        ),
        notes=(
            "A trained model's first queries and keys are smaller than normal ones, so training suffers less than "
            "figures say.",
        ),
        settings={"keys": KEYS, "head widths": widths, **settings(how, entries)},
    )


def trial(dim: int, scale: float | None, seed: int, quick: bool) -> Trial:
    named = {"name": "attention", "heads": 1, "head_dim": dim}
    return Trial(
        task={"name": "mqar", "pairs": 4, "symbols": 16},
        mixers=(named if scale is None else {**named, "scale": scale},),
        length=64,
        steps=120 if quick else 1000,
        rows=32,
        every=20,
        test_rows=256,
        optimizer=RATES,
        seed=seed,
    )


def softmax_figures(dim: int, scale: float, seed: int) -> Figures:
    """Of 512 normal queries over normal keys: (spread, entropy as a share of the most, |d softmax / d scores|)."""
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, dim, generator=random, dtype=torch.float64) for n in (512, KEYS))
    scores = q @ k.T * scale
    p = scores.softmax(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean() / torch.tensor(KEYS).log()
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return float(scores.std()), float(entropy), float(jacobian.flatten(1).norm(dim=1).mean())


def curves(
    title: str, sentence: str, y: str, index: int, plain: dict[int, Figures], divided: dict[int, Figures]
) -> Plot:
    lines = tuple(
        Line(name=name, points=tuple((float(d), found[index]) for d, found in some.items()))
        for name, some in (("undivided", plain), ("divided by √d", divided))
    )
    return Plot(title=title, sentence=sentence, x="head width d", y=y, lines=lines, log_x=True)
